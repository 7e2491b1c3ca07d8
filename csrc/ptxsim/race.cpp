// Happens-before, with vector clocks.
//
// The agents are warps and asynchronous operations. A warp's clock says up to which point it knows of every other
// warp's accesses, and up to which these are visible to the async proxy too, which is what a proxy fence raises. An
// operation takes its issuer's clock along, and is known to be over to whoever waited for it, and to whom these told.
// Lanes of one warp are taken to be ordered among themselves.
#include "race.h"

namespace ptxsim {

// How far a warp's accesses are visible: to threads, and to the async proxy in shared and in global memory.
enum Sight : uint8_t { kThreads, kAsyncShared, kAsyncGlobal, kSights };
using Seen = std::array<uint32_t, kSights>;

struct RaceClock {
  uint32_t first = 0;                          // the warp of the grid that `own` begins with
  std::vector<Seen> own;                       // of the warps of that cluster; empty: nothing is known
  std::unordered_map<uint32_t, Seen> foreign;  // of others, by warp of the grid
  bool isOwn(uint32_t warp) const { return warp - first < own.size(); }
  Seen& operator[](uint32_t warp) { return isOwn(warp) ? own[warp - first] : foreign[warp]; }
  bool knows(uint32_t warp, uint32_t time, Sight sight = kThreads) const {
    if (isOwn(warp)) return own[warp - first][sight] >= time;
    auto it = foreign.find(warp);
    return it != foreign.end() && it->second[sight] >= time;
  }
  void join(const RaceClock& o) {
    auto raise = [](Seen& to, const Seen& by) {
      for (int k = 0; k < kSights; ++k) to[k] = std::max(to[k], by[k]);
    };
    if (own.empty()) first = o.first, own.resize(o.own.size());
    if (first == o.first) {
      for (size_t i = 0; i < o.own.size(); ++i) raise(own[i], o.own[i]);
    } else {
      for (size_t i = 0; i < o.own.size(); ++i)
        if (o.own[i][kThreads]) raise((*this)[o.first + (uint32_t)i], o.own[i]);
    }
    for (auto& f : o.foreign) raise((*this)[f.first], f.second);
  }
  void fence(Sight sight) {  // what threads see is visible there too
    for (auto& s : own) s[sight] = s[kThreads];
    for (auto& f : foreign) f.second[sight] = f.second[kThreads];
  }
};
struct RaceCompletion {                                  // who found out, and when
  std::vector<std::pair<uint32_t, uint32_t>> observers;  // warp of the grid, its clock
};
struct RaceWarp {
  RaceClock clock, fenced, pending;  // at the last fence; acquired by relaxed operations, until a fence
  // What even a relaxed cluster barrier tells: when each warp came, and, as kAsyncShared, its last fence.mbarrier_init.
  RaceClock met;
  RaceClock mapped;  // at the last fence.proxy.tensormap acquire
  uint32_t self = 0, initFence = 0;
  uint32_t& now() { return clock[self][kThreads]; }
  void release(RaceClock& to, bool strong) {
    to.join(strong ? clock : fenced);
    now() += strong;
  }
  void acquire(const RaceClock& from, bool strong) { (strong ? clock : pending).join(from); }
};

constexpr uint32_t kPredecessor = ~0u;  // the launch before, as an agent: its end is at time 1

enum Flag : uint8_t { kStrong = 1, kOpFlag = 2, kWriteFlag = 4 };
struct Entry {
  uint32_t agent, time, pc;  // an operation: agent is its id
  uint16_t mask;             // bytes of the granule; 0: free
  uint8_t flags;
};
template <unsigned kMost>
struct Records {  // oldest first
  uint32_t n;
  Entry list[kMost];
  Entry* begin() { return list; }
  Entry* end() { return list + n; }
  void forget(uint16_t mask) {
    for (Entry& e : *this) e.mask &= (uint16_t)~mask;
  }
  void add(const Entry& mine) {
    for (Entry& e : *this) {
      if (!e.mask || e.agent != mine.agent || (e.flags ^ mine.flags) & kOpFlag) continue;
      if (e.time == mine.time && e.flags == mine.flags && e.pc == mine.pc) {
        e.mask |= mine.mask;
        return;
      }
      // a warp's own older record of the same bytes says nothing more
      if (!(e.flags & kOpFlag) && !(e.mask & ~mine.mask)) e.mask = 0;
    }
    n = (uint32_t)(std::remove_if(begin(), end(), [](const Entry& e) { return !e.mask; }) - list);
    if (n == kMost) n = (uint32_t)(std::copy(list + 1, list + kMost, list) - list);
    list[n++] = mine;
  }
};
struct Granule {  // 16 bytes of memory
  uint32_t life;  // its page's, or nothing is known of it
  Provenance from;
  Records<4> writes;
  Records<11> reads;
};
constexpr unsigned kPage = kPageBytes / 16;
struct Page {
  uint32_t life = 0;
  Granule granules[kPage] = {};
  LanePage lanes;
};
// Pages nobody uses: most CTAs need as many as the one before, and zeros for all would take longer than they run.
static std::vector<std::unique_ptr<Page>> gSpare;
constexpr size_t kMostSpare = 4096;

struct OpRecord {
  RaceClock clock;  // the issuer's, at issue
  uint32_t issuer;
  bool generic;  // cp.async: generic proxy
  std::vector<std::shared_ptr<RaceCompletion>> full, read;
};

struct RaceShadow {
  std::vector<std::unique_ptr<Page>> pages;
  std::map<std::pair<bool, uint32_t>, Entry> remote;  // of other CTAs: each warp's last access, then all operations
  explicit RaceShadow(uint64_t bytes) : pages((bytes + kPageBytes - 1) / kPageBytes) {}
  ~RaceShadow() {
    for (auto& p : pages)
      if (p && gSpare.size() < kMostSpare) gSpare.push_back(std::move(p));
  }
  Page& page(uint64_t offset) {
    auto& p = pages[offset / kPageBytes];
    if (p) return *p;
    if (gSpare.empty()) gSpare.push_back(std::make_unique<Page>());
    p = std::move(gSpare.back());
    gSpare.pop_back();
    ++p->life;
    p->lanes.shift = 4;
    p->lanes.units.clear();
    return *p;
  }
  Granule& at(uint64_t granule) {
    Page& p = page(16 * granule);
    Granule& g = p.granules[granule % kPage];
    if (g.life != p.life) g.life = p.life, g.writes.n = g.reads.n = g.from.op = 0;
    return g;
  }
};

struct RaceState {
  std::vector<std::shared_ptr<OpRecord>> ops{nullptr};
  std::unordered_map<uint64_t, RaceClock> sync;  // by address: what strong stores released
  std::unordered_map<const Buffer*, RaceShadow> global;
  // What was found to come before the side that is being checked. Clocks only grow, so it stays true.
  struct {
    uint64_t side = ~0ull;
    Entry before[32];
  } memo;
};

void raceStart(Launch& l, Cluster& c, uint64_t index) {
  if (!l.opt.detect) return;
  if (!l.race) l.race = std::make_shared<RaceState>();
  const uint32_t n = l.warpsPerCta * l.ctasPerCluster, first = (uint32_t)index * n;
  for (auto& cta : c.ctas) {
    cta->shadow = std::make_shared<RaceShadow>(cta->smemBytes);
    for (auto& w : cta->warps) {
      w.agent = first + cta->rank * l.warpsPerCta + w.index;
      w.race = std::make_shared<RaceWarp>();
      w.race->self = w.agent;
      w.race->clock = w.race->met = {first, std::vector<Seen>(n), {}};
      w.race->now() = 1;
    }
  }
}

namespace {

// The accessing side of a check: a warp, or an operation with the clocks of its issuer.
struct Side {
  Warp& w;
  const Inst& in;
  const RaceClock& clock;
  uint32_t agent, time;
  uint8_t flags;
  Sight sight;  // which others it must be able to see; kThreads: the generic proxy
};
Side side(Warp& w, const Inst& in, bool strong = false) {
  return {w, in, w.race->clock, w.agent, w.race->now(), (uint8_t)(strong ? kStrong : 0), kThreads};
}

// "": ordered. Otherwise what is missing.
const char* ordered(const Side& me, const Entry& e) {
  const char *no = "nothing orders them", *noProxy = "no proxy fence (fence.proxy.async) lies between";
  const bool write = e.flags & kWriteFlag;
  if ((e.flags & kOpFlag) == (me.flags & kOpFlag) && e.agent == me.agent) return "";
  if (!(e.flags & kOpFlag))
    return !me.clock.knows(e.agent, e.time) ? no : write && !me.clock.knows(e.agent, e.time, me.sight) ? noProxy : "";
  const OpRecord& op = *me.w.launch->race->ops[e.agent];
  no = "nothing waits for that operation in between";
  for (auto* list : {&op.full, &op.read})
    for (auto& c : *list)
      for (auto& o : c->observers) {
        if ((write && list == &op.read) || !me.clock.knows(o.first, o.second)) continue;
        if (!(op.generic && write) || me.clock.knows(o.first, o.second, me.sight)) return "";
        no = noProxy;
      }
  return no;
}

std::string nameOf(const Launch& l, const Entry& e) {
  const bool op = e.flags & kOpFlag;
  const uint32_t warp = op ? l.race->ops[e.agent]->issuer : e.agent;
  return cat(op ? "the asynchronous operation issued by " : "", "warp ", warp % l.warpsPerCta, " of CTA ",
             warp / l.warpsPerCta);
}
const char* verb(bool write) { return write ? "write" : "read"; }
[[noreturn]] void report(const Side& me, const Entry& e, bool write, const std::string& place, const char* why) {
  const Launch& l = *me.w.launch;
  me.w.fail(me.in, -1, "race on ", place, ": this ", (me.sight ? "asynchronous " : ""), verb(write), " and the ",
            verb(e.flags & kWriteFlag), " by ", nameOf(l, e), " at ", l.kernel->place(e.pc), ": ", why);
}

void touch(RaceState& s, Granule& g, const Side& me, uint16_t mask, Kind kind, const Spot& at) {
  const bool write = kind != Kind::Read;
  auto check = [&](const Entry& e) {
    if (!(e.mask & mask) || e.flags & me.flags & kStrong) return;  // two strong ones the memory system orders
    Entry& known = s.memo.before[(e.agent * 2 + (e.flags & kWriteFlag ? 1 : 0)) & 31];
    if (known.mask && known.agent == e.agent && known.time >= e.time && known.flags == e.flags) return;
    const char* why = ordered(me, e);
    if (*why)
      report(me, e, write, cat(at.name(), " at byte ", at.offset / 16 * 16 + (unsigned)__builtin_ctz(e.mask & mask)),
             why);
    known = e;
  };
  if (kind != Kind::Rewrite) {
    for (auto& e : g.writes) check(e);
    if (write) {
      for (auto& e : g.reads) check(e);
      g.from.op = 0;
      g.writes.forget(mask);
      g.reads.forget(mask);
    }
  }
  const Entry mine{me.agent, me.time, pcOf(me.w, me.in), mask, (uint8_t)(me.flags | (write ? kWriteFlag : 0))};
  write ? g.writes.add(mine) : g.reads.add(mine);
}

// Without a shadow where no race can be: in local memory, and in what the launch may only read.
Spot spotOf(RaceState& s, const Place& p) {
  if (p.cta) return {p.cta, nullptr, p.cta->shadow.get(), p.offset};
  if (!p.buffer || !p.buffer->writable) return {nullptr, p.buffer, nullptr, 0};
  const Buffer& b = *p.buffer;
  return {nullptr, &b, &s.global.try_emplace(&b, b.end - b.begin).first->second, (uint64_t)p.p - b.begin};
}

// An access to `bytes` from p on. The result says where that is.
Spot range(const Side& me, const Place& p, uint64_t bytes, Kind kind) {
  RaceState& s = *me.w.launch->race;
  const Spot at = spotOf(s, p);
  if (at.buffer && at.buffer->predecessor && !me.clock.knows(kPredecessor, 1))
    me.w.fail(me.in, -1, "race between launches on ", at.name(),
              ": this one was launched early, and the one before may ",
              "still use that; nothing orders this access after a griddepcontrol.wait");
  if (!at.shadow) return at;
  const uint64_t end = at.offset + bytes;
  const uint64_t key = (uint64_t)me.sight << 33 | (uint64_t)(me.flags & kOpFlag) << 31 | me.agent;
  if (s.memo.side != key) s.memo = {key, {}};
  for (Spot part = at; part.offset < end;) {
    const uint64_t lo = part.offset % 16, hi = std::min<uint64_t>(16, lo + end - part.offset);
    touch(s, at.shadow->at(part.offset / 16), me, (uint16_t)((1u << hi) - (1u << lo)), kind, part);
    part.offset += hi - lo;
  }
  return at;
}

// What a strong access of `sem` (0 none, 1 relaxed, 2 acquire, 3 release, 4 acq_rel, 5 volatile) takes from others that
// were at the same place, and leaves there.
void synchronise(Warp& w, uint8_t sem, uint64_t place, Kind kind) {
  auto& sync = w.launch->race->sync;
  if (kind == Kind::Read || kind == Kind::Atomic)
    if (auto it = sync.find(place); it != sync.end()) w.race->acquire(it->second, sem == 2 || sem == 4);
  if (kind == Kind::Read) return;
  RaceClock& to = sync[place];
  if (kind != Kind::Atomic) to = {};  // a plain store ends the release sequence; a read-modify-write continues it
  w.race->release(to, sem == 3 || sem == 4);
}

}  // namespace

void raceAccess(Warp& w, const Inst& in, uint32_t m, const uint64_t* a, uint32_t bytes, Kind kind) {
  if (!m || in.space == Space::Local || in.space == Space::Param) return;
  const uint8_t sem = in.x[0];
  const bool strong = kind == Kind::Atomic || sem;
  const Side me = side(w, in, strong);
  for (uint32_t left = m; left;) {
    const int i = firstLane(left);
    left &= left - 1;
    uint64_t n = bytes;
    uint32_t run = 1u << i;
    // neighbours of the same granule or run are one access
    while (left && a[firstLane(left)] == a[i] + n && n < 64) n += bytes, run |= left & (0 - left), left &= left - 1;
    const Place p = locate(w, in, i, in.space, a[i], 1, Kind::Read, 1);
    if (p.cta) raceRemote(w, in, i, *p.cta, nullptr);
    Spot at = range(me, p, n, kind);
    if (strong) {
      if (p.cta || p.buffer)
        synchronise(w, sem, p.cta ? a[i] | (w.race->clock.first + 1ull) << 40 : (uint64_t)p.p, kind);
    } else if (at.shadow) {
      for (int lane : lanesOf(run)) {
        laneAccess(w, in, lane, at.shadow->page(at.offset).lanes, at, bytes, kind);
        at.offset += bytes;
      }
    }
  }
  if (sem == 2 || sem == 4) laneSync(w, m);
}

void laneAsync(Warp& w, const Inst& in, int lane, const Place& p, uint32_t bytes, Kind kind) {
  if (!w.launch->race) return;
  Spot at = spotOf(*w.launch->race, p);
  for (const uint64_t end = at.offset + bytes; at.offset < end; at.offset += 16)
    laneAccess(w, in, lane, at.shadow->page(at.offset).lanes, at, (uint32_t)std::min<uint64_t>(16, end - at.offset),
               kind);
}

void racePlace(Warp& w, const Inst& in, const Place& p, uint32_t bytes, Kind kind) {
  if (w.launch->race) range(side(w, in), p, bytes, kind);
}
void raceTensorMap(Warp& w, const Inst& in, const Place& p) {
  if (!w.launch->race) return;
  const Side me = side(w, in);
  const Spot at = range(me, p, 128, Kind::Read);
  for (uint64_t g = at.offset / 16; at.shadow && g < at.offset / 16 + 8; ++g)
    for (const Entry& e : at.shadow->at(g).writes)
      if (e.mask && !(e.flags & kOpFlag) && me.clock.isOwn(e.agent) && !w.race->mapped.knows(e.agent, e.time))
        report(me, e, false, "the tensor map in " + p.buffer->name,
               "no fence.proxy.tensormap (generic, acquire) lies between");
}

// ---- synchronisation

void raceGridWait(Warp& w) {
  if (w.launch->race && w.launch->early) w.race->clock[kPredecessor] = {1, 1, 1};
}

void raceFence(Warp& w, const Inst& in, uint32_t m) {
  if (!w.launch->race) return;
  RaceWarp& r = *w.race;
  const int kind = in.x[0], order = in.x[1], space = in.x[2];
  if (kind != FenceAsync) laneSync(w, m);  // a fence of the pattern by which lanes may talk; a proxy fence is none
  if (kind == FenceMemory) {
    r.clock.join(r.pending);
    r.pending = {};
    r.fenced = r.clock;
  }
  if (kind == FenceAsync && space != 1) r.clock.fence(kAsyncShared);  // what is known is visible to the proxy too
  if (kind == FenceAsync && space < 2) r.clock.fence(kAsyncGlobal);
  if (kind == FenceTensormap && order != 4) r.mapped = r.clock;
  if (kind == FenceMbarrierInit) r.initFence = r.now();
  ++r.now();
}

void raceRelease(Warp& w, std::shared_ptr<RaceClock>& clock, bool release) {
  if (!w.launch->race) return;
  if (!clock) clock = std::make_shared<RaceClock>();
  w.race->release(*clock, release);
}
void raceAcquire(Warp& w, const std::shared_ptr<RaceClock>& clock, bool acquire) {
  if (clock) w.race->acquire(*clock, acquire);
}
void raceClusterArrive(Warp& w, bool release) {
  if (!w.launch->race) return;
  Cluster& c = *w.cta->cluster;
  RaceWarp& r = *w.race;
  if (!c.met) c.met = std::make_shared<RaceClock>(r.met);
  (*c.met)[r.self] = {r.now(), r.initFence, 0};
  raceRelease(w, c.clock, release);
  if (!release) ++r.now();
}
void raceClusterWait(Warp& w) {
  const Cluster& c = *w.cta->cluster;
  if (c.done) w.race->clock.join(*c.done);
  if (c.met) w.race->met.join(*c.met);
  laneSync(w, kAll);
}

// ---- mbarriers and shared memory of other CTAs: the other side must be there

void raceMbarrierInit(Warp& w, int lane, Mbarrier& b) {
  if (!w.launch->race) return;
  b.initBy = w.agent, b.initTime = w.race->now();
  b.initLane = (uint32_t)lane, b.initLaneTime = w.laneTime;
}
void raceMbarrierUse(Warp& w, const Inst& in, int lane, const Mbarrier& b) {
  if (!w.launch->race) return;
  const RaceWarp& r = *w.race;
  if (b.initBy == w.agent && (int)b.initLane != lane && b.initLaneTime >= w.laneNews[lane])
    w.fail(in, lane, "race on an mbarrier: nothing orders this operation after its mbarrier.init by lane ", b.initLane,
           " of the same warp (bar.warp.sync is missing)");
  if (r.clock.knows(b.initBy, b.initTime) || r.met.knows(b.initBy, b.initTime, kAsyncShared)) return;
  const uint32_t n = w.launch->warpsPerCta;
  w.fail(in, lane, "race on an mbarrier of CTA ", b.initBy / n, ": nothing orders this operation after its ",
         "mbarrier.init by warp ", b.initBy % n, " (",
         (r.met.knows(b.initBy, b.initTime) ? "fence.mbarrier_init"
          : b.initBy / n == r.self / n      ? "a barrier of the CTA"
                                            : "a cluster barrier"),
         " is missing)");
}
void raceRemote(Warp& w, const Inst& in, int lane, Cta& target, const AsyncOp* op) {
  if (!w.launch->race || &target == w.cta) return;
  RaceWarp& r = *w.race;
  auto started = [&](const Warp& x) { return r.clock.knows(x.agent, 1) || r.met.knows(x.agent, 1); };
  if (std::none_of(target.warps.begin(), target.warps.end(), started))
    w.fail(in, lane, "shared memory of CTA rank ", target.rank,
           " is accessed before that CTA is known to have started: a cluster barrier is missing");
  const Entry e{op ? op->id : r.self, op ? 0 : r.now(), pcOf(w, in), 1,
                (uint8_t)(op ? kOpFlag | kWriteFlag : kWriteFlag)};
  target.shadow->remote[{op != nullptr, e.agent}] = e;
}
void raceWaited(Warp& w, const Mbarrier& b, bool acquire) {
  raceAcquire(w, b.done, acquire);
  if (b.completion) b.completion->observers.emplace_back(w.agent, w.race->now());
}

// ---- asynchronous operations

void raceIssue(AsyncOp& op) {
  RaceState* s = op.warp->launch->race.get();
  op.id = s ? (uint32_t)s->ops.size() : 1;
  if (s)
    s->ops.push_back(std::make_shared<OpRecord>(OpRecord{std::move(*op.clock), op.warp->agent, op.generic, {}, {}}));
}
void raceAsync(const AsyncOp& op, const Place& p, uint32_t bytes, Kind kind) {
  RaceState* s = op.warp->launch->race.get();
  if (!s) return;
  const OpRecord& r = *s->ops[op.id];
  const Sight sight = r.generic ? kThreads : p.cta ? kAsyncShared : kAsyncGlobal;
  const uint8_t flags = kind == Kind::Atomic ? kOpFlag | kStrong : kOpFlag;
  range({*op.warp, *op.inst, r.clock, op.id, 0, flags, sight}, p, bytes, kind);
}
void raceAsyncSignal(const AsyncOp& op, Mbarrier& b) {
  RaceState* s = op.warp->launch->race.get();
  if (!s) return;
  if (!b.open) b.open = std::make_shared<RaceCompletion>();
  s->ops[op.id]->full.push_back(b.open);
  for (uint32_t id : op.covers) s->ops[id]->full.push_back(b.open);
}
void raceWaited(Warp& w, const AsyncOp& op, bool readsOnly) {
  if (!w.launch->race) return;
  OpRecord& r = *w.launch->race->ops[op.id];
  (readsOnly ? r.read : r.full).push_back(std::make_shared<RaceCompletion>(RaceCompletion{{{w.agent, w.race->now()}}}));
}
Provenance& raceTag(Cta& cta, uint32_t offset) { return cta.shadow->at(offset / 16).from; }

// ---- the end of a CTA

void checkExit(Cta& cta) {
  if (!cta.launch->opt.detect) return;
  const Kernel& k = *cta.launch->kernel;
  const std::string kernel = "kernel " + k.name;
  RaceClock clock, met;  // what its warps knew when they exited
  for (auto& w : cta.warps) clock.join(w.race->clock), met.join(w.race->met);
  const Side me{cta.warps[0], k.code[0], clock, kAll, 0, 0, kThreads};
  for (auto& [who, e] : cta.shadow->remote) {
    const auto [op, agent] = who;
    if (!*ordered(me, e) || (!op && met.knows(agent, e.time))) continue;
    throw Error("CTA ", cta.linear, " may exit before ", nameOf(*cta.launch, e),
                (op ? " has written its shared memory: nothing waits"
                    : " accesses its shared memory: a cluster barrier is missing"),
                "\n  at ", kernel, ": ", k.place(e.pc));
  }
  for (auto& w : cta.warps) {
    for (auto& op : w.bulk.ops)
      if (cta.launch->race->ops[op->id]->read.empty())
        w.fail(*op->inst, -1,
               "the CTA exits before a bulk store has read its shared memory: cp.async.bulk.wait_group is missing");
    if (!w.wgmma.ops.empty())
      w.fail(*w.wgmma.ops.front()->inst, -1, "the CTA exits with a wgmma that nobody has waited for");
  }
  for (auto& o : cta.wgmma)
    if (!o.issued.empty() && !o.issued.back()->id)
      throw Error(kernel, ": not all warps of a warpgroup have issued the same number of wgmma");
  for (auto& [offset, b] : cta.mbars)
    if (b.tx != 0)
      throw Error(kernel, ": CTA ", cta.linear, " exits while an mbarrier still expects ", b.tx,
                  " bytes (transaction count; negative: more came than were expected)");
}

}  // namespace ptxsim
