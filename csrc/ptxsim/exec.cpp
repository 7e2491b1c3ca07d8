// Scheduling: fragments inside a warp, warps inside a cluster, clusters inside a launch.
#include "race.h"

namespace ptxsim {

// ---- errors

std::string Kernel::place(size_t pc) const {
  std::string out;
  for (int loc = source[pc]->loc; loc; loc = module->locs[(size_t)loc].caller) {
    const std::string at = module->position(loc);
    out += (out.empty() ? "" : " inlined at ") + at.substr(at.rfind('/') + 1);
  }
  return cat(out, out.empty() ? "" : ", ", "PTX line ", source[pc]->ptxLine, " (", source[pc]->name, ")");
}

std::string where(const Warp& w, const Inst& in, int lane) {
  const unsigned* id = w.cta->id;
  const std::string out = cat("kernel ", w.kernel->name, ": ", w.kernel->place(pcOf(w, in)), ", CTA (", id[0], ",",
                              id[1], ",", id[2], "), warp ", w.index);
  return lane < 0 ? out : cat(out, ", lane ", lane, " (thread ", w.index * kLanes + (unsigned)lane, ")");
}

void Warp::needValid(const Inst& in, Ref r, uint32_t mask, const char* role) {
  uint32_t bad = mask & ~validOf(r);
  if (bad && launch->opt.detect) fail(in, __builtin_ctz(bad), "uninitialised value used as ", role);
}

// ---- fragments

Fragment& Warp::jump(uint32_t mask, uint32_t target) {
  reschedule |= mask != frag().mask || frags.size() > 1;
  if (mask == frag().mask) {
    next = target;
    return frag();
  }
  ++launch->n.divergent;
  frag().mask &= ~mask;
  frags.push_back(frag());
  frags.back().mask = mask;
  frags.back().pc = target;
  return frags.back();
}

void Warp::block(Wait kind, Describe describe) {
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
  const unsigned n = (unsigned)__builtin_popcount(mask);
  cta->liveThreads -= n;
  cta->cluster->liveThreads -= n;
  for (auto& f : frags)
    if (f.wait == Wait::Converge) f.wait = Wait::None;
  launch->progress();
  reschedule = true;
  barrierExit(*cta);
  clusterExit(*this, mask);
}

static bool canMerge(const Fragment& a, const Fragment& b) {
  return a.mask && b.mask && a.pc == b.pc && a.wait != Wait::Barrier && b.wait != Wait::Barrier && a.calls == b.calls;
}

// Merges what has met, then chooses: the lowest pc first, so that fragments wait for each other where control flow
// joins; one that has run long without meeting anyone gives way, so that every fragment makes progress.
bool Warp::schedule() {
  reschedule = false;
  for (auto f = frags.begin(); f != frags.end(); ++f) {
    auto met = std::find_if(frags.begin(), f, [&](auto& g) { return canMerge(*f, g); });
    if (met == f) continue;
    met->mask |= std::exchange(f->mask, 0);
    met->wait = Wait::None;
    met->age = std::max(f->age, met->age);
  }
  frags.erase(std::remove_if(frags.begin(), frags.end(), [](auto& f) { return !f.mask; }), frags.end());
  const bool rotate = frags.size() > 1 && executed >> 12 != sliceStamp;
  if (rotate) sliceStamp = executed >> 12;
  Fragment* best = nullptr;
  for (auto& f : frags) {
    if (f.wait == Wait::Poll && f.pollEpoch != launch->epoch) f.wait = Wait::None;
    if (f.wait != Wait::None) continue;
    if (!best || (rotate ? f.age < best->age : f.pc < best->pc)) best = &f;
  }
  cur = best ? (unsigned)(best - frags.data()) : 0;
  stopPc = kAll;
  if (!best) return false;
  pc = best->pc;
  best->age = executed;
  for (auto& f : frags)
    if (f.pc > pc && f.wait != Wait::Barrier) stopPc = std::min(stopPc, f.pc);
  return true;
}

// An instruction beside wgmmas in flight.
static void checkInflight(Warp& w, const Inst& in) {
  auto read = [&](Ref r) {
    if (w.inflight[r.id] == 1) w.fail(in, -1, "an accumulator is read before wgmma.wait_group");
  };
  in.eachDestination([&](Ref r) {
    if (const uint8_t role = w.inflight[r.id])
      w.fail(in, -1, role == 1 ? "an accumulator" : "an A register",
             " of a wgmma that has not been waited for is overwritten");
  });
  for (Ref r : {in.d, in.a, in.b, in.c}) read(r);
  if (!in.ext) return;
  for (auto* refs : {&in.ext->refs, &in.ext->refs2})
    for (Ref r : *refs) read(r);
}

bool Warp::run(unsigned quantum) {
  bool ready = schedule();
  if (!ready) return false;
  const Inst* code = kernel->code.data();
  uint64_t *hits = kernel->coverage->hits.data(), *taken = kernel->coverage->taken.data();
  uint64_t threadInst = 0, before = executed;
  uint32_t mask = frag().mask;
  while (ready && quantum--) {
    const Inst& in = code[pc];
    uint32_t m = mask;
    next = pc + 1;
    if (in.guard) {
      if (mask & ~validOf(in.guard)) needValid(in, in.guard, mask, "predicate");
      m &= predicate(in.guard);
      taken[pc] += m != 0;
    }
    ++executed;
    if (m && in.convergeAll && m != live) {
      if (mask == live)
        fail(in, __builtin_ctz(live & ~m), "an .aligned instruction is predicated off for some lanes of the warp");
      block(Wait::Converge);
    } else {
      ++hits[pc];
      if (m) {
        threadInst += (unsigned)__builtin_popcount(m);
        if (__builtin_expect(numInflight != 0, 0) && !in.isWgmma) checkInflight(*this, in);
        if (__builtin_expect(in.needsFence, 0)) in.eachDestination([&](Ref r) { unfenced[r.id] = 1; });
        in.fn(*this, in, m);
      }
    }
    pc = next;
    if (__builtin_expect(reschedule || pc == stopPc, 0)) {
      frag().pc = pc;
      ready = schedule();
      if (ready) mask = frag().mask;
    }
  }
  if (ready) frag().pc = pc;
  launch->n.warpInst += executed - before;
  launch->n.threadInst += threadInst;
  launch->clock += executed - before;
  return executed != before;
}

// ---- clusters

static std::list<std::vector<Line>> gSpare;  // memory of CTAs that are over: fresh pages would take a quarter of a run
constexpr size_t kMostSpare = 512;

void Launch::startCta(Cluster& c) {
  const Kernel& k = *kernel;
  Cta& t = *c.ctas.emplace_back(std::make_unique<Cta>());
  t.launch = this;
  t.cluster = &c;
  t.rank = (unsigned)c.ctas.size() - 1;
  for (unsigned d = 0; d < 3; ++d) t.id[d] = c.id[d] * clusterDim[d] + coordinate(clusterDim, t.rank, d);
  t.linear = t.id[0] + (uint64_t)grid[0] * (t.id[1] + (uint64_t)grid[1] * t.id[2]);
  t.smemBytes = kSharedReserved + k.staticShared + dynShared;
  auto take = [&](uint32_t bytes, uint8_t fill) {
    if (gSpare.empty()) gSpare.emplace_back();
    t.memory.splice(t.memory.end(), gSpare, gSpare.begin());
    t.memory.back().resize(bytes / sizeof(Line) + 1);
    return (uint8_t*)memset(t.memory.back().data(), fill, bytes);
  };
  t.smem = take(t.smemBytes, 0xa5);
  t.smemValid = take(t.smemBytes, 0);
  t.hasMbar.resize((t.smemBytes + 7) / 8 + 1);
  t.wgmma.resize((warpsPerCta + 3) / 4);
  t.liveThreads = threads;
  t.warps.resize(warpsPerCta);
  for (Warp& w : t.warps) {
    w.cta = &t;
    w.launch = this;
    w.kernel = kernel;
    w.index = (unsigned)(&w - t.warps.data());
    const unsigned n = std::min(kLanes, threads - w.index * kLanes);
    w.live = n == kLanes ? kAll : (1u << n) - 1;
    w.base[0] = take(k.regBytes, 0xa5);
    w.base[1] = (uint8_t*)k.constants.data();
    w.valid = (uint32_t*)take(k.numIds * 4, 0);
    w.valid[0] = kAll;
    w.local = take(k.localBytes * kLanes, 0xa5);
    w.localValid = take(k.localBytes * kLanes, 0);
    w.frags.resize(1);
    w.frag().mask = w.live;
    w.inflight.resize(k.numIds);
    w.unfenced.resize(k.numIds);
    w.maxnreg = regsPerThread;
    for (auto& s : k.specials)
      for (unsigned i = 0; i < kLanes; ++i) {
        const uint64_t v = s.special->value(w, i, s.dimension) + s.add;
        memcpy(w.base[0] + s.off + i * s.bytes, &v, s.bytes);
      }
  }
}

void Launch::startCluster(uint64_t index) {
  Cluster& c = *resident.emplace_back(std::make_unique<Cluster>());
  const unsigned clusters[3] = {grid[0] / clusterDim[0], grid[1] / clusterDim[1], grid[2] / clusterDim[2]};
  for (unsigned d = 0; d < 3; ++d) c.id[d] = coordinate(clusters, index, d);
  c.liveThreads = threads * ctasPerCluster;
  while (c.ctas.size() < ctasPerCluster) startCta(c);
  raceStart(*this, c, index);
}

void Launch::performNow(AsyncOp& op, bool all) {
  for (auto& before : op.after)
    if (!before->done) performNow(*before, true);
  op.after.clear();
  if (!op.done) op.done = op.step();
  while (all && !op.done) op.done = op.step();
  progress();
}

void Launch::issue(std::shared_ptr<AsyncOp> op) {
  if (opt.timing == Timing::Early || (opt.timing == Timing::Random && rng() % 3 == 0))
    performNow(*op, true);
  else
    op->warp->cta->cluster->pending.push_back(std::move(op));
}

// Late work is done in order of issue, one step at a time; random timing takes any.
bool Launch::performSome(Cluster& c) {
  while (!c.pending.empty()) {
    auto it = c.pending.begin();
    if (opt.timing == Timing::Random) std::advance(it, (long)(rng() % c.pending.size()));
    std::shared_ptr<AsyncOp> op = *it;
    const bool open = !op->done;
    if (open) performNow(*op, false);
    if (op->done) c.pending.erase(it);
    if (open) return true;
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
      while (performSome(c)) continue;
      return Finished;
    }
    if (!ran && epoch == epochBefore && !performSome(c)) return Blocked;
    idleRounds = epoch == epochBefore ? idleRounds + 1 : 0;
    if (idleRounds > 100) {
      if (performSome(c)) continue;
      return Idle;
    }
    if (n.threadInst - startInst > (opt.eager ? 20000u : 4000000u)) return Slice;
  }
}

void Launch::run() {
  numClusters = 1;
  for (int d = 0; d < 3; ++d) numClusters *= grid[d] / clusterDim[d];
  std::vector<uint32_t> shuffled(opt.order == Order::Random ? numClusters : 0);
  std::iota(shuffled.begin(), shuffled.end(), 0);
  std::shuffle(shuffled.begin(), shuffled.end(), rng);
  uint64_t nextCluster = 0, idleSince = epoch, idleInst = 0;
  size_t at = 0, stuck = 0, gaveUp = 0;  // slices, and waits given up, since something changed
  bool allBlocked = true;                // in these slices
  auto admit = [&] {
    const uint64_t i = nextCluster++;
    startCluster(opt.order == Order::Random ? shuffled[i] : opt.order == Order::Reverse ? numClusters - 1 - i : i);
    stuck = 0, allBlocked = true;
  };
  while (nextCluster < numClusters || !resident.empty()) {
    while (nextCluster < numClusters && (resident.empty() || (opt.eager && resident.size() < maxResident))) admit();
    at %= resident.size();
    const Progress p = runCluster(*resident[at]);
    if (p == Finished) {
      for (auto& cta : resident[at]->ctas)
        if (gSpare.size() < kMostSpare) gSpare.splice(gSpare.begin(), cta->memory);
      resident.erase(resident.begin() + (long)at);
      continue;
    }
    if (epoch != idleSince) {
      idleSince = epoch, idleInst = n.threadInst;
      stuck = gaveUp = 0, allBlocked = true;
    }
    allBlocked &= p == Blocked;
    // One that only waits gives way to its neighbours, then to newcomers as far as the machine has room.
    if (++stuck > resident.size() || p == Slice) {
      if (nextCluster < numClusters && resident.size() < maxResident) {
        admit();
        at = resident.size() - 1;
        continue;
      }
      // Waits that have given up often come back to the same place and nothing happens.
      const bool hopeless = allBlocked ? ++gaveUp > 200 || !giveUpWaits() : n.threadInst - idleInst > opt.maxIdle;
      if (hopeless) reportDeadlock();
      if (allBlocked) stuck = 0;
    }
    ++at;
  }
}

template <class F>
void Launch::eachFragment(F visit) {
  for (auto& c : resident)
    for (auto& cta : c->ctas)
      for (auto& w : cta->warps)
        for (w.cur = 0; w.cur < w.frags.size(); ++w.cur)
          if (w.frag().mask) visit(w, w.frag());
}

// A potentially blocking wait may also return false after a while. Each such wait does, before a deadlock is called.
bool Launch::giveUpWaits() {
  bool any = false;
  eachFragment([&](Warp&, Fragment& f) {
    if (f.wait != Wait::Poll || !f.mayGiveUp) return;
    f.giveUp = any = true;
    f.wait = Wait::None;
  });
  return any;
}

void Launch::reportDeadlock() {
  std::string s = "deadlock: no thread of kernel " + kernel->name + " can go on\n";
  unsigned lines = 0;
  eachFragment([&](Warp& w, Fragment& f) {
    if (lines++ > 40) return;
    const Inst& in = kernel->code[f.wait == Wait::Barrier ? f.shownPc : f.pc];
    char lanes[32];
    snprintf(lanes, sizeof lanes, "  lanes %08x ", f.mask);
    const char* kind = f.wait == Wait::Converge  ? "waits for the other lanes of its warp"
                       : f.wait == Wait::Barrier ? "waits at a barrier"
                       : f.wait == Wait::Poll    ? "waits"
                                                 : "runs without effect";
    s += cat(lanes, f.describe && f.wait != Wait::None ? f.describe(w, in) : kind, ", at ", where(w, in, -1), "\n");
  });
  if (resident.size() == maxResident && numClusters > maxResident)
    s += cat("  (", resident.size(),
             " clusters are resident, the most this launch may have; others have not started)\n");
  throw Error(s);
}

}  // namespace ptxsim
