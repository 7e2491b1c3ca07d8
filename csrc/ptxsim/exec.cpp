// Scheduling: fragments inside a warp, warps inside a cluster, clusters inside a launch.
#include <algorithm>

#include "race.h"
#include "sim.h"

namespace ptxsim {

Options& options() {
  static Options o;
  return o;
}

// ---- errors

std::string Kernel::place(size_t pc) const {
  std::string out;
  for (int loc = source[pc].loc; loc; loc = module->locs[(size_t)loc].caller) {
    const std::string at = module->position(loc);
    out += (out.empty() ? "" : " inlined at ") + at.substr(at.rfind('/') + 1);
  }
  return out + (out.empty() ? "" : ", ") + "PTX line " + std::to_string(source[pc].ptxLine) + " (" + source[pc].text +
         ")";
}

std::string where(const Warp& w, const Inst& in, int lane) {
  const Kernel& k = *w.kernel;
  const unsigned* id = w.cta->id;
  char text[96];
  snprintf(text, sizeof text, ", CTA (%u,%u,%u), warp %u", id[0], id[1], id[2], w.index);
  std::string out = "kernel " + k.name + ": " + k.place((size_t)(&in - k.code.data())) + text;
  if (lane >= 0)
    out += ", lane " + std::to_string(lane) + " (thread " + std::to_string(w.index * kLanes + (unsigned)lane) + ")";
  return out;
}

void Warp::needValid(const Inst& in, Ref r, uint32_t mask, const char* role) {
  uint32_t bad = mask & ~validOf(r);
  if (bad && launch->opt.detect) fail(in, __builtin_ctz(bad), "uninitialised value used as ", role);
}

// ---- fragments

void Warp::jump(uint32_t mask, uint32_t target, uint32_t activeMask) {
  Fragment& f = frag();
  ++launch->n.branches;
  if (mask == activeMask && mask == f.mask) {
    next = target;
    if (frags.size() > 1) reschedule = true;
    return;
  }
  ++launch->n.divergent;
  Fragment other = f;
  other.mask = mask;
  other.pc = target;
  other.wait = Wait::None;
  f.mask &= ~mask;
  frags.push_back(std::move(other));
  reschedule = true;
}

void Warp::block(Wait kind, std::string (*describe)(Warp&, const Inst&)) {
  Fragment& f = frag();
  f.wait = kind;
  f.describe = describe;
  f.pollEpoch = launch->epoch;
  next = pc;
  reschedule = true;
}

void barrierExit(Cta& cta);
void clusterExit(Warp& w, uint32_t mask);

void Warp::exitLanes(uint32_t mask) {
  live &= ~mask;
  frag().mask &= ~mask;
  unsigned n = (unsigned)__builtin_popcount(mask);
  cta->liveThreads -= n;
  cta->cluster->liveThreads -= n;
  for (auto& f : frags)
    if (f.wait == Wait::Converge) f.wait = Wait::None;
  if (!live) raceExit(*this);
  launch->progress();
  reschedule = true;
  barrierExit(*cta);
  clusterExit(*this, mask);
}

static bool canMerge(const Fragment& a, const Fragment& b) {
  auto open = [](const Fragment& f) { return f.wait != Wait::Barrier && f.pollState == 0; };
  return a.pc == b.pc && open(a) && open(b) && a.stack == b.stack;
}

// Merges what has met, then chooses: the lowest pc first, so that fragments wait for each other where control flow
// joins; one that has run long without meeting anyone gives way, so that every fragment makes progress.
void Warp::schedule() {
  reschedule = false;
  for (size_t i = 0; i < frags.size();) {
    if (frags[i].mask == 0) {
      frags.erase(frags.begin() + (long)i);
      continue;
    }
    bool merged = false;
    for (size_t j = 0; j < i && !merged; ++j)
      if (canMerge(frags[i], frags[j])) {
        frags[j].mask |= frags[i].mask;
        frags[j].wait = Wait::None;
        frags[j].age = std::max(frags[i].age, frags[j].age);
        merged = true;
      }
    if (merged)
      frags.erase(frags.begin() + (long)i);
    else
      ++i;
  }
  int best = -1;
  const bool rotate = frags.size() > 1 && (executed >> 12) != (frags.size() ? sliceStamp : 0);
  if (rotate) sliceStamp = executed >> 12;
  for (size_t i = 0; i < frags.size(); ++i) {
    Fragment& f = frags[i];
    if (f.wait == Wait::Poll && f.pollEpoch != launch->epoch) f.wait = Wait::None;
    if (f.wait != Wait::None) continue;
    if (best < 0)
      best = (int)i;
    else if (rotate ? f.age < frags[(size_t)best].age : f.pc < frags[(size_t)best].pc)
      best = (int)i;
  }
  cur = best < 0 ? 0 : (unsigned)best;
  ready = best >= 0;
  stopPc = kAll;
  if (!ready) return;
  frags[cur].age = executed;
  for (size_t i = 0; i < frags.size(); ++i)
    if (i != cur && frags[i].pc > frags[cur].pc && frags[i].wait != Wait::Barrier)
      stopPc = std::min(stopPc, frags[i].pc);
}

void Warp::checkInflight(const Inst& in) {
  auto test = [&](Ref r, bool write) {
    uint8_t f = r.id < inflight.size() ? inflight[r.id] : 0;
    if (f == 1)
      fail(in, -1,
           write ? "an accumulator of a wgmma that has not been waited for is overwritten"
                 : "an accumulator is read before wgmma.wait_group");
    if (f == 2 && write) fail(in, -1, "an A register of a wgmma that has not been waited for is overwritten");
  };
  test(in.d, !in.storesD);
  test(in.a, false);
  test(in.b, false);
  test(in.c, false);
  if (in.ext) {
    for (auto& r : in.ext->refs) test(r, !in.storesD);
    for (auto& r : in.ext->refs2) test(r, false);
  }
}

void Warp::noteUnfenced(const Inst& in) {
  unfenced[in.d.id] = 1;
  if (in.ext)
    for (auto& r : in.ext->refs) unfenced[r.id] = 1;
}

bool Warp::run(unsigned quantum) {
  if (live == 0) return false;
  schedule();
  if (!ready) return false;
  const Inst* code = kernel->code.data();
  uint64_t* hits = const_cast<uint64_t*>(kernel->hits.data());
  uint64_t* taken = const_cast<uint64_t*>(kernel->taken.data());
  uint64_t threadInst = 0, before = executed;
  uint32_t mask = frags[cur].mask;
  pc = frags[cur].pc;
  while (quantum--) {
    const Inst& in = code[pc];
    uint32_t m = mask;
    next = pc + 1;
    if (in.guard != kNoGuard) {
      if (mask & ~valid[in.guardId]) needValid(in, Ref{in.guard, in.guardId}, mask, "predicate");
      uint32_t g = *reinterpret_cast<const uint32_t*>(base[0] + in.guard);
      m &= in.guardNegate ? ~g : g;
      taken[pc] += m != 0;
    }
    ++executed;
    if (m) {
      if (in.convergeAll && m != live) {
        if (mask == live)
          fail(in, __builtin_ctz(live & ~m), "an .aligned instruction is predicated off for some lanes of the warp");
        block(Wait::Converge);
      } else {
        ++hits[pc];
        threadInst += (unsigned)__builtin_popcount(m);
        if (__builtin_expect(numInflight != 0, 0) && !in.isWgmma) checkInflight(in);
        if (__builtin_expect(in.needsFence, 0)) noteUnfenced(in);
        in.fn(*this, in, m);
      }
    } else {
      ++hits[pc];
    }
    pc = next;
    if (__builtin_expect(reschedule || pc == stopPc, 0)) {
      if (cur < frags.size()) frags[cur].pc = pc;
      schedule();
      if (!ready || live == 0) break;
      mask = frags[cur].mask;
      pc = frags[cur].pc;
    }
  }
  if (ready && live) frags[cur].pc = pc;
  launch->n.warpInst += executed - before;
  launch->n.threadInst += threadInst;
  launch->clock += executed - before;
  return executed != before;
}

// ---- clusters

static void initWarp(Warp& w) {
  const Kernel& k = *w.kernel;
  memset(w.base[0], 0xa5, k.regBytes);
  memset(w.valid, 0, k.numIds * 4);
  w.valid[0] = kAll;
  if (w.localValid) memset(w.localValid, 0, (size_t)k.localBytes * kLanes);
  for (auto& s : k.specials)
    for (unsigned i = 0; i < kLanes; ++i) {
      const uint64_t v = s.special->value(w, i, s.dimension) + s.add;
      memcpy(w.base[0] + s.off + i * s.bytes, &v, s.bytes);
    }
}

std::unique_ptr<Cluster> Launch::makeCluster(uint64_t index) {
  auto c = std::make_unique<Cluster>();
  unsigned nc[3] = {grid[0] / clusterDim[0], grid[1] / clusterDim[1], grid[2] / clusterDim[2]};
  c->id[0] = (unsigned)(index % nc[0]);
  c->id[1] = (unsigned)(index / nc[0] % nc[1]);
  c->id[2] = (unsigned)(index / nc[0] / nc[1]);
  const Kernel& k = *kernel;
  const uint32_t smemBytes = kSharedReserved + k.staticShared + dynShared;
  for (unsigned r = 0; r < ctasPerCluster; ++r) {
    std::unique_ptr<Cta> cta;
    if (!pool.empty()) {
      cta = std::move(pool.back());
      pool.pop_back();
    } else {
      cta = std::make_unique<Cta>();
      cta->launch = this;
      cta->smemBytes = smemBytes;
      cta->memory.reset(new uint64_t[(2 * (size_t)smemBytes + 64) / 8 + 2]);
      cta->smem = reinterpret_cast<uint8_t*>(((uintptr_t)cta->memory.get() + 15) & ~(uintptr_t)15);
      cta->smemValid = cta->smem + smemBytes;
      cta->warps.resize(warpsPerCta);
      const size_t regs = (k.regBytes + 63) / 64 * 64, ids = ((size_t)k.numIds * 4 + 63) / 64 * 64,
                   local = (size_t)k.localBytes * kLanes;
      const size_t each = regs + ids + 2 * local + 64;
      cta->regMemory.reset(new uint64_t[(each * warpsPerCta + 64) / 8 + 8]);
      uint8_t* at = reinterpret_cast<uint8_t*>(((uintptr_t)cta->regMemory.get() + 63) & ~(uintptr_t)63);
      for (unsigned i = 0; i < warpsPerCta; ++i, at += each / 64 * 64) {
        Warp& w = cta->warps[i];
        w.base[0] = at;
        w.valid = reinterpret_cast<uint32_t*>(at + regs);
        w.local = at + regs + ids;
        w.localValid = w.local + local;
      }
    }
    Cta& t = *cta;
    t.cluster = c.get();
    t.rank = r;
    for (int d = 0; d < 3; ++d) {
      unsigned inner = d == 0   ? r % clusterDim[0]
                       : d == 1 ? r / clusterDim[0] % clusterDim[1]
                                : r / clusterDim[0] / clusterDim[1];
      t.id[d] = c->id[d] * clusterDim[d] + inner;
    }
    t.linear = t.id[0] + (uint64_t)grid[0] * (t.id[1] + (uint64_t)grid[1] * t.id[2]);
    memset(t.smem, 0xa5, smemBytes);
    memset(t.smemValid, 0, smemBytes);
    for (auto& v : k.sharedVars)
      if (!v.second->init.empty()) {
        memcpy(t.smem + v.first, v.second->init.data(), v.second->init.size());
        memset(t.smemValid + v.first, 1, v.second->init.size());
      }
    for (auto& b : t.bars) b = NamedBarrier();
    t.mbarIndex.assign((smemBytes + 7) / 8 + 1, 0);
    t.mbars.assign(1, Mbarrier());
    t.liveThreads = threads;
    t.regPool = 0;
    t.wgmma.assign((warpsPerCta + 3) / 4, {});
    c->liveThreads += threads;
    for (unsigned i = 0; i < warpsPerCta; ++i) {
      Warp& w = t.warps[i];
      w.cta = &t;
      w.launch = this;
      w.kernel = kernel;
      w.index = i;
      unsigned n = std::min(kLanes, threads - i * kLanes);
      w.live = n == kLanes ? kAll : (1u << n) - 1;
      w.base[1] = reinterpret_cast<uint8_t*>(const_cast<uint64_t*>(k.constants.data()));
      w.frags.assign(1, Fragment());
      w.frags[0].pc = (uint32_t)k.entry;
      w.frags[0].mask = w.live;
      w.cur = 0;
      w.executed = 0;
      w.sliceStamp = 0;
      w.carry = 0;
      w.clusterArrived = 0;
      w.bulk = w.cp = w.wgmma = OpTrack();
      w.inflight.assign(k.numIds, 0);
      w.numInflight = 0;
      w.unfenced.assign(k.numIds, 0);
      w.wgmmaCount = 0;
      w.maxnreg = regsPerThread;
      initWarp(w);
    }
    c->ctas.push_back(std::move(cta));
  }
  raceStart(*this, *c, index);
  return c;
}

void Launch::performNow(AsyncOp& op, bool all) {
  for (auto& before : op.after)
    if (!before->done) performNow(*before, true);
  op.after.clear();
  do {
    if (op.done) break;
    op.done = op.step();
  } while (all);
  progress();
}

void Launch::issue(std::shared_ptr<AsyncOp> op) {
  if (opt.timing == Timing::Early || (opt.timing == Timing::Random && rng() % 3 == 0))
    performNow(*op, true);
  else
    op->cluster->pending.push_back(std::move(op));
}

// Late work is done in order of issue, one step at a time; random timing takes any.
bool Launch::performSome(Cluster& c) {
  while (!c.pending.empty()) {
    auto it = c.pending.begin();
    if (opt.timing == Timing::Random) std::advance(it, (long)(rng() % c.pending.size()));
    std::shared_ptr<AsyncOp> op = *it;
    const bool was = op->done;
    if (!was) performNow(*op, false);
    if (op->done) c.pending.erase(it);
    if (!was) return true;
  }
  return false;
}

Launch::Progress Launch::runCluster(Cluster& c) {
  const uint64_t startInst = n.threadInst;
  unsigned idleRounds = 0;
  std::vector<Warp*> order;
  for (auto& cta : c.ctas)
    for (auto& w : cta->warps) order.push_back(&w);
  for (;;) {
    const uint64_t epochBefore = epoch;
    bool ran = false;
    if (opt.seed) std::shuffle(order.begin(), order.end(), rng);
    for (Warp* w : order) {
      if (w->live == 0) continue;
      ran |= w->run(opt.seed ? 1 + (unsigned)(rng() % 200) : 400);
      if (opt.timing == Timing::Random && !c.pending.empty() && rng() % 4 == 0) performSome(c);
    }
    if (c.liveThreads == 0) {
      for (auto& cta : c.ctas) checkExit(*cta);
      while (performSome(c)) {
      }
      return Finished;
    }
    if (!ran && epoch == epochBefore && !performSome(c)) return Blocked;
    if (epoch == epochBefore) {
      if (++idleRounds > 100) {
        if (performSome(c)) continue;
        return Idle;
      }
    } else {
      idleRounds = 0;
    }
    if (n.threadInst - startInst > (opt.eager ? 20000u : 4000000u)) return Slice;
  }
}

void Launch::retire(Cluster& c) {
  for (auto& cta : c.ctas) pool.push_back(std::move(cta));
}

void Launch::run() {
  numClusters = 1;
  for (int d = 0; d < 3; ++d) numClusters *= grid[d] / clusterDim[d];
  std::vector<uint32_t> order;
  if (opt.order != "forward") {
    order.resize(numClusters);
    for (uint64_t i = 0; i < numClusters; ++i) order[i] = (uint32_t)(opt.order == "reverse" ? numClusters - 1 - i : i);
    if (opt.order == "random") std::shuffle(order.begin(), order.end(), rng);
  }
  uint64_t nextCluster = 0, idleSince = epoch, idleInst = 0;
  size_t at = 0, stuck = 0;
  auto admit = [&] {
    uint64_t i = nextCluster++;
    resident.push_back(makeCluster(order.empty() ? i : order[i]));
  };
  bool allBlocked = true;
  while (nextCluster < numClusters || !resident.empty()) {
    while (nextCluster < numClusters && (resident.empty() || (opt.eager && resident.size() < maxResident))) admit();
    at %= resident.size();
    Cluster& c = *resident[at];
    Progress p = runCluster(c);
    if (p == Finished) {
      retire(c);
      resident.erase(resident.begin() + (long)at);
      stuck = 0, allBlocked = true;
      continue;
    }
    allBlocked &= p == Blocked;
    if (epoch != idleSince) idleSince = epoch, idleInst = n.threadInst, stuck = 0, allBlocked = p == Blocked;
    // One that only waits gives way to its neighbours, then to newcomers as far as the machine has room.
    if (++stuck > resident.size() || p == Slice) {
      if (nextCluster < numClusters && resident.size() < maxResident) {
        admit();
        stuck = 0, allBlocked = true;
        at = resident.size() - 1;
        continue;
      }
      if (p != Slice && allBlocked) {
        if (!giveUpWaits()) reportDeadlock();
        stuck = 0, allBlocked = true;
      } else if (n.threadInst - idleInst > opt.maxIdle && epoch == idleSince) {
        reportDeadlock();
      }
    }
    ++at;
  }
}

// A potentially blocking wait may also return false after a while. Each such wait gets that once before a deadlock is
// called.
bool Launch::giveUpWaits() {
  bool any = false;
  for (auto& c : resident)
    for (auto& cta : c->ctas)
      for (auto& w : cta->warps)
        for (auto& f : w.frags)
          if (f.mask && f.wait == Wait::Poll && f.mayGiveUp) {
            if (f.gaveUpEpoch != epoch) f.gaveUp = 0;
            if (++f.gaveUp > 200) continue;  // it comes back to the same wait and nothing happens
            f.gaveUpEpoch = epoch;
            f.giveUp = true;
            f.wait = Wait::None;
            any = true;
          }
  return any;
}

void Launch::reportDeadlock() {
  std::string s = "deadlock: no thread of kernel " + kernel->name + " can go on\n";
  unsigned lines = 0;
  for (auto& c : resident)
    for (auto& cta : c->ctas)
      for (auto& w : cta->warps)
        for (size_t i = 0; i < w.frags.size(); ++i) {
          Fragment& f = w.frags[i];
          if (!f.mask || lines++ > 40) continue;
          const Inst& in = kernel->code[f.wait == Wait::Barrier ? f.shownPc : f.pc];
          char lanes[32];
          snprintf(lanes, sizeof lanes, "lanes %08x ", f.mask);
          w.cur = (unsigned)i;
          const char* kind = f.wait == Wait::Converge  ? "waits for the other lanes of its warp"
                             : f.wait == Wait::Barrier ? "waits at a barrier"
                             : f.wait == Wait::Poll    ? "waits"
                                                       : "runs without effect";
          s += "  " + std::string(lanes) + (f.describe && f.wait != Wait::None ? f.describe(w, in) : kind) + ", at " +
               where(w, in, -1) + "\n";
        }
  if (nextResidentHint())
    s += "  (" + std::to_string(resident.size()) +
         " clusters are resident, the most this launch may have; others have not started)\n";
  throw Error(s);
}

}  // namespace ptxsim
