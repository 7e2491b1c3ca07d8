// Happens-before, with vector clocks.
//
// The agents are warps and asynchronous operations. A warp has two clocks: `seen` says up to which point it knows of
// every other warp's accesses, `async` up to which point those accesses are also visible to the async proxy, which is
// what a proxy fence raises. An operation takes its issuer's clocks along, and is known to be over to whoever waited
// for it, and to whom these told. Lanes of one warp are taken to be ordered among themselves.
#include "race.h"

#include <algorithm>
#include <array>

#include "ops.h"

namespace ptxsim {

// How far a warp's accesses are visible: to threads, and to the async proxy in shared and in global memory.
enum Sight : uint8_t { kThreads, kAsyncShared, kAsyncGlobal, kSights };
struct RaceClock {
  std::vector<uint32_t> all;                                            // by sight, then by warp of the own cluster
  std::unordered_map<uint32_t, std::array<uint32_t, kSights>> foreign;  // by warp of the grid
  size_t size() const { return all.size() / kSights; }                  // the same in every clock of a launch
  void start(size_t warps) { all.assign(kSights * warps, 0); }
  uint32_t* seen(int sight) { return all.data() + (size_t)sight * size(); }
  const uint32_t* seen(int sight) const { return all.data() + (size_t)sight * size(); }
  void join(const RaceClock& o) {
    if (!size()) start(o.size());
    for (size_t i = 0; i < o.all.size(); ++i) all[i] = std::max(all[i], o.all[i]);
    for (auto& f : o.foreign) {
      auto& mine = foreign[f.first];
      for (int k = 0; k < kSights; ++k) mine[k] = std::max(mine[k], f.second[k]);
    }
  }
  void fence(Sight sight) {  // what threads see is visible there too
    std::copy_n(seen(kThreads), size(), seen(sight));
    for (auto& f : foreign) f.second[sight] = f.second[kThreads];
  }
};
struct RaceCompletion {                                  // who found out, and when
  std::vector<std::pair<uint32_t, uint32_t>> observers;  // warp of the grid, its clock
};
struct RaceWarp {
  RaceClock clock, fenced, pending;  // pending: acquired by relaxed operations, until a fence
  // What even a relaxed cluster barrier tells: when each warp came to it, and, as kAsyncShared, its last
  // fence.mbarrier_init.
  RaceClock met;
  std::vector<uint32_t> mapped;  // seen, at the last fence.proxy.tensormap acquire
  uint32_t initFence = 0;
  bool hasFenced = false, hasPending = false;
  uint32_t first = 0, self = 0;  // warps of the grid: first of the cluster, own
  uint32_t& own() { return clock.seen(kThreads)[self - first]; }
};

namespace {

enum Flag : uint8_t { kStrong = 1, kOpFlag = 2, kWriteFlag = 4 };
struct Entry {
  uint32_t agent, time, pc;  // an operation: agent is its id
  uint16_t mask;             // bytes of the granule; 0: free
  uint8_t flags, age;
};
constexpr unsigned kSharedWrites = 4, kSharedReads = 11;
struct Granule {  // 16 bytes of memory
  Entry w[kSharedWrites], r[kSharedReads];
  Provenance from;
};
constexpr unsigned kPage = kPageBytes / 16;
struct Page {
  Granule granules[kPage];
  LanePage lanes;
};

struct OpRecord {
  RaceClock clock;  // the issuer's, at issue
  uint32_t first = 0, issuer = 0;
  bool generic = false;  // cp.async: generic proxy
  std::vector<std::shared_ptr<RaceCompletion>> full, read;
};

}  // namespace

struct RaceShadow {
  std::vector<std::unique_ptr<Page>> pages;
  std::vector<Entry> remote, remoteOps;  // of other CTAs: each warp's last access, all operations
  RaceClock exit, met;                   // what its warps knew when they exited
  void resize(uint64_t bytes) { pages.resize((bytes + kPageBytes - 1) / kPageBytes); }
  Page& page(uint64_t offset) {
    auto& p = pages[offset / kPageBytes];
    if (!p) p.reset(new Page());
    return *p;
  }
  Granule& at(uint64_t granule) { return page(16 * granule).granules[granule % kPage]; }
};

struct RaceState {
  Launch* launch;
  std::vector<std::shared_ptr<OpRecord>> ops{nullptr};
  std::unordered_map<uint64_t, RaceClock> sync;  // by address: what strong stores released
  std::unordered_map<const Buffer*, RaceShadow> global;
  // What was found to come before the side that is being checked. Clocks only grow, so it stays true.
  struct {
    uint64_t side = ~0ull;
    Entry before[32];
  } memo;
};

RaceState* raceCreate(Launch& l) {
  auto* s = new RaceState;
  s->launch = &l;
  return s;
}
void raceDestroy(RaceState* s) { delete s; }

void raceStart(Launch& l, Cluster& c, uint64_t index) {
  if (!l.race) return;
  const uint32_t n = l.warpsPerCta * l.ctasPerCluster, first = (uint32_t)index * n;
  for (auto& cta : c.ctas) {
    cta->shadow = std::make_shared<RaceShadow>();
    cta->shadow->resize(cta->smemBytes);
    for (auto& w : cta->warps) {
      laneStart(w);
      w.race = std::make_shared<RaceWarp>();
      w.race->first = first;
      w.race->self = first + cta->rank * l.warpsPerCta + w.index;
      w.race->clock.start(n);
      w.race->met.start(n);
      w.race->own() = 1;
    }
  }
}

namespace {

bool knows(const RaceClock& c, uint32_t first, uint32_t warp, uint32_t time, Sight sight = kThreads) {
  const uint32_t i = warp - first;
  if (i < c.size()) return c.seen(sight)[i] >= time;
  auto it = c.foreign.find(warp);
  return it != c.foreign.end() && it->second[sight] >= time;
}

// The accessing side of a check: a warp, or an operation with the clocks of its issuer.
struct Side {
  const RaceClock* clock;
  uint32_t first, agent, time, pc;
  uint8_t flags;
  Sight sight;  // which others it must be able to see; kThreads: the generic proxy
  bool isOp, unchanged = false;
};

const char* verb(bool write) { return write ? "write" : "read"; }

// "": ordered. Otherwise what is missing.
const char* ordered(RaceState& s, const Side& me, const Entry& e) {
  if (e.flags & kOpFlag) {
    if (me.isOp && e.agent == me.agent) return "";
    const OpRecord& op = *s.ops[e.agent];
    const bool write = e.flags & kWriteFlag;
    bool known = false;
    for (int list = 0; list < (write ? 1 : 2); ++list)
      for (auto& c : list ? op.read : op.full)
        for (auto& o : c->observers) {
          if (!knows(*me.clock, me.first, o.first, o.second)) continue;
          known = true;
          if (!(op.generic && write) || knows(*me.clock, me.first, o.first, o.second, me.sight)) return "";
        }
    return known ? "no proxy fence (fence.proxy.async) lies between" : "nothing waits for that operation in between";
  }
  if (!me.isOp && e.agent == me.agent) return "";
  if (!knows(*me.clock, me.first, e.agent, e.time)) return "nothing orders them";
  if (e.flags & kWriteFlag && !knows(*me.clock, me.first, e.agent, e.time, me.sight))
    return "no proxy fence (fence.proxy.async) lies between";
  return "";
}

[[noreturn]] void report(RaceState& s, Warp& w, const Inst& in, const Side& me, const Entry& e, bool write,
                         const std::string& place, const char* why) {
  const Kernel& k = *w.kernel;
  const uint32_t n = s.launch->warpsPerCta;
  std::string other;
  uint32_t warp = e.flags & kOpFlag ? s.ops[e.agent]->issuer : e.agent;
  if (e.flags & kOpFlag) other = "the asynchronous operation issued by ";
  other += "warp " + std::to_string(warp % n) + " of CTA " + std::to_string(warp / n) + " at " + k.place(e.pc);
  throw Error("race on ", place, ": this ", (me.sight ? "asynchronous " : ""), verb(write), " and the ",
              verb(e.flags & kWriteFlag), " by ", other, ": ", why, "\n  at ", where(w, in, -1));
}

void put(Entry* list, unsigned n, const Side& me, uint16_t mask, uint8_t flags) {
  Entry* free = nullptr;
  Entry* oldest = list;
  for (unsigned i = 0; i < n; ++i) {
    Entry& e = list[i];
    if (e.mask && e.agent == me.agent && (e.flags & kOpFlag) == (flags & kOpFlag) && e.time == me.time &&
        e.flags == flags && e.pc == me.pc) {
      e.mask |= mask;
      return;
    }
    // one's own older record of the same bytes says nothing more
    if (e.mask && !(flags & kOpFlag) && e.agent == me.agent && !(e.flags & kOpFlag) && !(e.mask & ~mask)) e.mask = 0;
    if (!e.mask && !free) free = &e;
    if (e.age < oldest->age) oldest = &e;
  }
  if (!free) free = oldest;
  uint8_t age = 0;
  for (unsigned i = 0; i < n; ++i) age = std::max(age, list[i].age);
  *free = Entry{me.agent, me.time, me.pc, mask, flags, (uint8_t)(age < 255 ? age + 1 : 255)};
}

void touch(RaceState& s, Warp& w, const Inst& in, Granule& g, const Side& me, uint16_t mask, Kind kind,
           uint64_t where16, const Memory& memory) {
  const bool write = kind != Kind::Read;
  auto check = [&](const Entry& e) {
    if (!(e.mask & mask)) return;
    if (e.flags & me.flags & kStrong) return;  // both strong: ordered by the memory system
    Entry& known = s.memo.before[(e.agent * 2 + (e.flags & kWriteFlag ? 1 : 0)) & 31];
    if (known.mask && known.agent == e.agent && known.time >= e.time && known.flags == e.flags) return;
    const char* why = ordered(s, me, e);
    if (*why)
      report(s, w, in, me, e, write,
             memory.name() + " at byte " + std::to_string(where16 * 16 + (unsigned)__builtin_ctz(e.mask & mask)), why);
    known = e;
  };
  if (me.unchanged) {
    put(g.w, kSharedWrites, me, mask, me.flags | kWriteFlag);
    return;
  }
  for (auto& e : g.w) check(e);
  if (write) {
    g.from.op = 0;
    for (auto& e : g.r) check(e);
    for (auto& e : g.w) e.mask &= (uint16_t)~mask;
    for (auto& e : g.r) e.mask &= (uint16_t)~mask;
    put(g.w, kSharedWrites, me, mask, me.flags | kWriteFlag);
  } else {
    put(g.r, kSharedReads, me, mask, me.flags);
  }
}

void range(RaceState& s, Warp& w, const Inst& in, RaceShadow& shadow, const Side& me, uint64_t offset, uint64_t bytes,
           Kind kind, const Memory& memory) {
  const uint64_t end = offset + bytes, key = (uint64_t)me.sight << 33 | (uint64_t)me.isOp << 32 | me.agent;
  if (s.memo.side != key) {
    s.memo.side = key;
    for (auto& e : s.memo.before) e.mask = 0;
  }
  for (uint64_t g = offset / 16; g * 16 < end; ++g) {
    const uint64_t lo = std::max(offset, g * 16) - g * 16, hi = std::min(end, g * 16 + 16) - g * 16;
    touch(s, w, in, shadow.at(g), me, (uint16_t)(((1u << hi) - 1) & ~((1u << lo) - 1)), kind, g, memory);
  }
}

Side side(Warp& w, const Inst& in, bool strong) {
  RaceWarp& r = *w.race;
  return {&r.clock, r.first, r.self, r.own(), (uint32_t)(&in - w.kernel->code.data()), (uint8_t)(strong ? kStrong : 0),
          kThreads, false};
}
RaceShadow& globalShadow(RaceState& s, const Buffer& b) {
  RaceShadow& g = s.global[&b];
  if (g.pages.empty()) g.resize(b.end - b.begin);
  return g;
}

void release(Warp& w, RaceClock& to, bool strongRelease) {
  RaceWarp& r = *w.race;
  if (strongRelease) {
    to.join(r.clock);
    ++r.own();
  } else if (r.hasFenced) {
    to.join(r.fenced);
  }
}
void acquire(Warp& w, const RaceClock& from, bool strongAcquire) {
  RaceWarp& r = *w.race;
  if (strongAcquire)
    r.clock.join(from);
  else
    r.pending.join(from), r.hasPending = true;
}
// A clock that another cluster may read names its warps by their place in the grid.
RaceClock exported(const RaceWarp& r, const RaceClock& c) {
  RaceClock out;
  out.foreign = c.foreign;
  for (uint32_t i = 0; i < c.size(); ++i)
    if (c.seen(kThreads)[i])
      for (int k = 0; k < kSights; ++k) out.foreign[r.first + i][k] = c.seen(k)[i];
  return out;
}
void imported(Warp& w, const RaceClock& from, bool strongAcquire) {
  RaceWarp& r = *w.race;
  RaceClock own;
  own.start(r.clock.size());
  for (auto& f : from.foreign) {
    const uint32_t i = f.first - r.first;
    if (i >= own.size()) own.foreign[f.first] = f.second;
    for (int k = 0; k < kSights && i < own.size(); ++k) own.seen(k)[i] = f.second[k];
  }
  own.seen(kThreads)[r.self - r.first] = 0;
  acquire(w, own, strongAcquire);
}

}  // namespace

// A write that changes nothing cannot be seen by anybody: it is only remembered.
static void accessLanes(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* a, uint32_t bytes, Kind kind,
                        bool unchanged) {
  RaceState& s = *w.launch->race;
  const bool strong = kind == Kind::Atomic || in.x[0] > 0;
  if (space == Space::Local || space == Space::Param) return;
  Side me = side(w, in, strong);
  me.unchanged = unchanged;
  const LaneAccess laneKind = kind == Kind::Read ? LaneAccess::Read
                              : unchanged        ? LaneAccess::Rewrite
                                                 : LaneAccess::Write;
  for (uint32_t left = m; left;) {
    int i = firstLane(left);
    left &= left - 1;
    uint64_t at = a[i], n = bytes;
    uint32_t run = 1u << i;
    // neighbours of the same granule or run are one access
    while (left && a[firstLane(left)] == at + n && n < 64) n += bytes, run |= left & (0 - left), left &= left - 1;
    auto check = [&](RaceShadow& shadow, uint64_t offset, const Memory& memory) {
      range(s, w, in, shadow, me, offset, n, kind, memory);
      for (; run && !strong; run &= run - 1, offset += bytes)
        laneAccess(w, in, firstLane(run), shadow.page(offset).lanes, memory, offset, bytes, laneKind);
    };
    const bool shared = space == Space::Shared || (space == Space::Generic && inShared(at));
    if (shared) {
      Place p = locateShared(w, in, i, (uint32_t)at, 1, Kind::Read, 1, space == Space::Shared && in.x[4] == 0);
      raceRemote(w, in, i, *p.cta, nullptr);
      check(*p.cta->shadow, p.offset, Memory{p.cta, nullptr});
    } else if (!inLocal(at)) {
      Buffer* b = Arena::get().find(at, 1);
      if (!b) {
        uint64_t moved = w.launch->alias ? w.launch->alias(at, n) : 0;
        if (!moved || !(b = Arena::get().find(at = moved, 1))) continue;
      }
      if (b->writable) check(globalShadow(s, *b), at - b->begin, Memory{nullptr, b});
    }
    if (!strong) continue;
    // sem: 0 weak (an atomic without .sem is relaxed), 1 relaxed, 2 acquire, 3 release, 4 acq_rel, 5 volatile
    const uint8_t sem = in.x[0];
    const uint64_t key = shared ? at | (w.race->first + 1ull) << 40 : at;
    if (kind != Kind::Write) {
      auto it = s.sync.find(key);
      if (it != s.sync.end()) imported(w, it->second, sem == 2 || sem == 4);
    }
    if (kind != Kind::Read) {
      RaceClock out;
      RaceWarp& r = *w.race;
      if (sem == 3 || sem == 4) {
        out = exported(r, r.clock);
        ++r.own();
      } else if (r.hasFenced) {
        out = exported(r, r.fenced);
      }
      RaceClock& to = s.sync[key];
      if (kind == Kind::Write)
        to = RaceClock();  // a plain store ends the release sequence; a read-modify-write continues it
      to.join(out);
    }
  }
  if (strong && (in.x[0] == 2 || in.x[0] == 4)) laneSync(w, m);
}

void raceAccess(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* a, uint32_t bytes, Kind kind) {
  accessLanes(w, in, m, space, a, bytes, kind, false);
}
void raceWrites(Warp& w, const Inst& in, uint32_t m, uint32_t changed, Space space, const uint64_t* a, uint32_t bytes) {
  if (m & changed) accessLanes(w, in, m & changed, space, a, bytes, Kind::Write, false);
  if (m & ~changed) accessLanes(w, in, m & ~changed, space, a, bytes, Kind::Write, true);
}
void laneAsync(Warp& w, const Inst& in, int lane, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind) {
  if (!w.launch->race) return;
  const LaneAccess laneKind = kind == Kind::Read ? LaneAccess::Read : LaneAccess::Write;
  for (uint32_t end = offset + bytes; offset < end;) {
    const uint32_t n = std::min({bytes, 16u, end - offset});
    laneAccess(w, in, lane, cta.shadow->page(offset).lanes, Memory{&cta, nullptr}, offset, n, laneKind);
    offset += n;
  }
}
uint32_t raceAgent(const Warp& w) { return w.race->self; }

void racePlace(Warp& w, const Inst& in, const Place& p, uint32_t bytes, Kind kind) {
  RaceState* s = w.launch->race;
  if (s && p.cta)
    range(*s, w, in, *p.cta->shadow, side(w, in, false), p.offset, bytes, kind, Memory{p.cta, nullptr});
  else if (s && p.buffer && p.buffer->writable)
    range(*s, w, in, globalShadow(*s, *p.buffer), side(w, in, false), (uint64_t)p.p - p.buffer->begin, bytes, kind,
          Memory{nullptr, p.buffer});
}
void raceTensorMap(Warp& w, const Inst& in, Buffer& b, uint64_t address) {
  if (!w.launch->race || !b.writable) return;
  RaceState& s = *w.launch->race;
  const Side me = side(w, in, false);
  RaceShadow& shadow = globalShadow(s, b);
  range(s, w, in, shadow, me, address - b.begin, 128, Kind::Read, Memory{nullptr, &b});
  const RaceWarp& r = *w.race;
  for (uint64_t g = (address - b.begin) / 16; g < (address - b.begin) / 16 + 8; ++g)
    for (const Entry& e : shadow.at(g).w) {
      const uint32_t i = e.agent - r.first;
      if (!e.mask || e.flags & kOpFlag || i >= r.clock.size()) continue;
      if (r.mapped.empty() || r.mapped[i] < e.time)
        report(s, w, in, me, e, false, "the tensor map in " + b.name,
               "no fence.proxy.tensormap (generic, acquire) lies between");
    }
}

// ---- synchronisation

void raceFence(Warp& w, const Inst& in, uint32_t m) {
  if (!w.launch->race) return;
  RaceWarp& r = *w.race;
  if (in.x[0] != FenceAsync) laneSync(w, m);  // a fence of the pattern by which lanes may talk; a proxy fence is none
  if (in.x[0] == FenceAsync) {                // what is known is visible to the async proxy too
    if (in.x[2] != 1) r.clock.fence(kAsyncShared);
    if (in.x[2] < 2) r.clock.fence(kAsyncGlobal);
    ++r.own();
    return;
  }
  if (in.x[0] == FenceTensormap && in.x[1] != 4)
    r.mapped.assign(r.clock.seen(kThreads), r.clock.seen(kThreads) + r.clock.size()), ++r.own();
  if (in.x[0] == FenceMbarrierInit) r.initFence = r.own()++;
  if (in.x[0] == FenceMemory) {
    if (r.hasPending) r.clock.join(r.pending), r.hasPending = false, r.pending = RaceClock();
    r.fenced = r.clock;
    r.hasFenced = true;
    ++r.own();
  }
}

void raceArrive(Warp& w, NamedBarrier& b) {
  if (!w.launch->race) return;
  if (!b.clock) b.clock = std::make_shared<RaceClock>();
  release(w, *b.clock, true);
}
void raceBarrier(Cta& cta, NamedBarrier& b) {
  if (!cta.launch->race) return;
  for (auto& x : b.waiting) acquire(*x.warp, *b.clock, true), laneSync(*x.warp, x.mask);
}
void raceClusterArrive(Warp& w, bool strongRelease) {
  if (!w.launch->race) return;
  auto& c = w.cta->cluster->clock;
  if (!c) c = std::make_shared<RaceClock>();
  RaceWarp& r = *w.race;
  auto& met = w.cta->cluster->met;
  if (!met) met = std::make_shared<RaceClock>(r.met);
  met->seen(kThreads)[r.self - r.first] = r.own();
  met->seen(kAsyncShared)[r.self - r.first] = r.initFence;
  release(w, *c, strongRelease);
  if (!strongRelease) ++r.own();
}
void raceClusterDone(Cluster& c) {
  c.done = c.clock;
  c.clock.reset();
}
void raceClusterWait(Warp& w) {
  if (!w.launch->race) return;
  Cluster& c = *w.cta->cluster;
  if (c.done) acquire(w, *c.done, true);
  if (c.met) w.race->met.join(*c.met);
  laneSync(w, kAll);
}

// ---- mbarriers and shared memory of other CTAs: the other side must be there

void raceMbarrierInit(Warp& w, int lane, Mbarrier& b) {
  if (!w.launch->race) return;
  b.initBy = w.race->self, b.initTime = w.race->own();
  b.initLane = (uint32_t)lane, b.initLaneTime = w.laneTime;
}
void raceMbarrierUse(Warp& w, const Inst& in, int lane, const Mbarrier& b) {
  if (!w.launch->race) return;
  const RaceWarp& r = *w.race;
  if (b.initBy == r.self) {
    if ((int)b.initLane != lane && b.initLaneTime >= w.laneNews[lane])
      w.fail(in, lane, "race on an mbarrier: nothing orders this operation after its mbarrier.init by lane ",
             b.initLane, " of the same warp (bar.warp.sync is missing)");
    return;
  }
  if (knows(r.clock, r.first, b.initBy, b.initTime) || knows(r.met, r.first, b.initBy, b.initTime, kAsyncShared))
    return;
  const uint32_t n = w.launch->warpsPerCta;
  const bool fence = knows(r.met, r.first, b.initBy, b.initTime);
  w.fail(in, lane, "race on an mbarrier of CTA ", b.initBy / n, ": nothing orders this operation after its ",
         "mbarrier.init by warp ", b.initBy % n, " (",
         (fence                        ? "fence.mbarrier_init"
          : b.initBy / n == r.self / n ? "a barrier of the CTA"
                                       : "a cluster barrier"),
         " is missing)");
}
void raceRemote(Warp& w, const Inst& in, int lane, Cta& target, const AsyncOp* op) {
  if (!w.launch->race || &target == w.cta) return;
  RaceWarp& r = *w.race;
  const uint32_t n = w.launch->warpsPerCta, at = target.rank * n;
  bool started = false;
  for (uint32_t i = at; i < at + n; ++i) started |= r.clock.seen(kThreads)[i] || r.met.seen(kThreads)[i];
  if (!started)
    w.fail(in, lane, "shared memory of CTA rank ", target.rank,
           " is accessed before that CTA is known to have started: a cluster barrier is missing");
  const uint32_t pc = (uint32_t)(&in - w.kernel->code.data());
  if (op) {
    target.shadow->remoteOps.push_back({op->id, 0, pc, 1, kOpFlag | kWriteFlag, 0});
    return;
  }
  const Entry e{r.self, r.own(), pc, 1, kWriteFlag, 0};
  for (auto& x : target.shadow->remote)
    if (x.agent == e.agent) {
      x = e;
      return;
    }
  target.shadow->remote.push_back(e);
}
void raceExit(Warp& w) {
  if (w.launch->race) w.cta->shadow->exit.join(w.race->clock), w.cta->shadow->met.join(w.race->met);
}
static void checkRemote(Cta& cta) {
  RaceState& s = *cta.launch->race;
  const RaceWarp& own = *cta.warps[0].race;
  const Side me{&cta.shadow->exit, own.first, kAll, 0, 0, 0, kThreads, false};
  const uint32_t n = cta.launch->warpsPerCta;
  auto check = [&](const Entry& e) {
    if (!*ordered(s, me, e)) return;
    const uint32_t warp = e.flags & kOpFlag ? s.ops[e.agent]->issuer : e.agent;
    if (!(e.flags & kOpFlag) && knows(cta.shadow->met, own.first, warp, e.time)) return;
    const std::string who = "warp " + std::to_string(warp % n) + " of CTA " + std::to_string(warp / n);
    throw Error("CTA ", cta.linear, " may exit before ",
                (e.flags & kOpFlag
                     ? "the asynchronous operation issued by " + who + " has written its shared memory: nothing waits"
                     : who + " accesses its shared memory: a cluster barrier is missing"),
                "\n  at kernel ", cta.launch->kernel->name, ": ", cta.launch->kernel->place(e.pc));
  };
  for (const Entry& e : cta.shadow->remote) check(e);
  for (const Entry& e : cta.shadow->remoteOps) check(e);
}

void raceRelease(Warp& w, Mbarrier& b, bool strongRelease) {
  if (!w.launch->race) return;
  if (!b.clock) b.clock = std::make_shared<RaceClock>();
  release(w, *b.clock, strongRelease);
}
void racePhase(Mbarrier& b) {
  b.done = std::move(b.clock);
  b.clock.reset();
  b.completion.reset();
  b.completion = b.open;
  b.open.reset();
}
void raceAcquire(Warp& w, Mbarrier& b, bool strongAcquire) {
  if (!w.launch->race) return;
  if (b.done) acquire(w, *b.done, strongAcquire);
  if (b.completion) b.completion->observers.emplace_back(w.race->self, w.race->own());
}

// ---- asynchronous operations

void raceJoin(Warp& w, std::shared_ptr<RaceClock>& clock) {
  if (!w.launch->race) return;
  if (!clock) clock = std::make_shared<RaceClock>();
  clock->join(w.race->clock);
  ++w.race->own();
}
void raceIssueAt(AsyncOp& op, const std::shared_ptr<RaceClock>& clock) {
  RaceState* s = op.warp->launch->race;
  if (!s) {
    op.id = 1;
    return;
  }
  auto r = std::make_shared<OpRecord>();
  r->clock = *clock;
  r->first = op.warp->race->first;
  r->issuer = op.warp->race->self;
  r->generic = op.generic;
  op.id = (uint32_t)s->ops.size();
  s->ops.push_back(std::move(r));
}
void raceIssue(Warp& w, AsyncOp& op) {
  std::shared_ptr<RaceClock> clock;
  raceJoin(w, clock);
  raceIssueAt(op, clock);
}

static Side opSide(const AsyncOp& op, Sight sight) {
  const OpRecord& r = *op.warp->launch->race->ops[op.id];
  const uint32_t pc = (uint32_t)(op.inst - op.warp->kernel->code.data());
  return {&r.clock, r.first, op.id, 0, pc, kOpFlag, r.generic ? kThreads : sight, true};
}
void raceAsyncShared(AsyncOp& op, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind) {
  RaceState* s = op.warp->launch->race;
  const Memory memory{&cta, nullptr};
  if (s) range(*s, *op.warp, *op.inst, *cta.shadow, opSide(op, kAsyncShared), offset, bytes, kind, memory);
}
void raceAsyncGlobal(AsyncOp& op, Buffer& b, uint64_t address, uint64_t bytes, Kind kind) {
  RaceState* s = op.warp->launch->race;
  if (!s || !b.writable) return;
  Side me = opSide(op, kAsyncGlobal);
  if (kind == Kind::Atomic) me.flags |= kStrong;
  range(*s, *op.warp, *op.inst, globalShadow(*s, b), me, address - b.begin, bytes, kind, Memory{nullptr, &b});
}
void raceAsyncSignal(const AsyncOp& op, Mbarrier& b) {
  RaceState* s = op.warp->launch->race;
  if (!s) return;
  if (!b.open) b.open = std::make_shared<RaceCompletion>();
  auto add = [&](uint32_t id) { s->ops[id]->full.push_back(b.open); };
  add(op.id);
  for (uint32_t id : op.covers) add(id);
}
void raceWaited(Warp& w, const AsyncOp& op, bool readsOnly) {
  RaceState* s = w.launch->race;
  if (!s) return;
  auto c = std::make_shared<RaceCompletion>();
  c->observers.emplace_back(w.race->self, w.race->own());
  (readsOnly ? s->ops[op.id]->read : s->ops[op.id]->full).push_back(std::move(c));
}
void raceTag(Cta& cta, uint32_t offset, const Provenance& from) {
  if (cta.launch->race) cta.shadow->at(offset / 16).from = from;
}
const Provenance* raceTagOf(Cta& cta, uint32_t offset) {
  if (!cta.launch->race) return nullptr;
  const Provenance& p = cta.shadow->at(offset / 16).from;
  return p.op ? &p : nullptr;
}

// ---- the end of a CTA

void checkExit(Cta& cta) {
  if (!cta.launch->opt.detect) return;
  checkRemote(cta);
  for (auto& w : cta.warps) {
    for (auto& op : w.bulk.ops)
      if (!op->exitOk() && cta.launch->race && cta.launch->race->ops[op->id]->read.empty()) {
        throw Error(
            "the CTA exits before a bulk store has read its shared memory: cp.async.bulk.wait_group is missing\n  at ",
            where(w, *op->inst, -1));
      }
    if (!w.wgmma.ops.empty())
      throw Error("the CTA exits with a wgmma that nobody has waited for\n  at ",
                  where(w, *w.wgmma.ops.front()->inst, -1));
  }
  for (auto& o : cta.wgmma)
    if (!o.issued.empty() && !o.issued.back()->id)
      throw Error("kernel ", cta.launch->kernel->name,
                  ": not all warps of a warpgroup have issued the same number of wgmma");
  for (auto& b : cta.mbars)
    if (b.live && b.tx != 0)
      throw Error("kernel ", cta.launch->kernel->name, ": CTA ", cta.linear, " exits while an mbarrier still expects ",
                  b.tx, " bytes (transaction count; negative: more came than were expected)");
}

}  // namespace ptxsim
