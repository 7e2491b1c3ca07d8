// Named barriers of a CTA and the cluster barrier (PTX ISA 9.7.13.1 to 9.7.13.4).
#include <algorithm>

#include "ops.h"
#include "race.h"

namespace ptxsim {

bool gatherLanes(Warp& w, const Inst& in, Ref maskRef, uint32_t m);
void decodeWarpSync(Dec& d);

namespace {

enum { Sync, Arrive, RedPopc, RedAnd, RedOr };

std::string describeBarrier(Warp& w, const Inst& in) {
  Ref id = in.a;
  unsigned k = lane32(w, id, (unsigned)firstLane(w.frag().mask)) & 15;
  NamedBarrier& b = w.cta->bars[k];
  unsigned want = b.all ? w.cta->liveThreads : b.expected;
  return "waits at barrier " + std::to_string(k) + ": " + std::to_string(b.arrived) + " of " + std::to_string(want) +
         " threads have arrived";
}

void complete(Cta& cta, NamedBarrier& b) {
  raceBarrier(cta, b);
  for (auto& x : b.waiting) {
    for (auto& f : x.warp->frags)
      if (f.wait == Wait::Barrier && f.mask == x.mask) f.wait = Wait::None;
    const Inst& in = *x.inst;
    if (in.x[0] >= RedPopc) {
      uint32_t r = in.x[0] == RedPopc ? b.redCount : in.x[0] == RedAnd ? b.redAnd : b.redOr;
      if (in.x[0] == RedPopc) {
        uint32_t v[kLanes];
        for (auto& y : v) y = r;
        storeLanes(*x.warp, in.d, v, x.mask);
      } else {
        uint32_t& p = x.warp->pred(in.d);
        p = r ? p | x.mask : p & ~x.mask;
      }
      x.warp->setValid(in.d, x.mask, kAll);
    }
  }
  uint64_t g = b.generation;
  b = NamedBarrier();
  b.generation = g + 1;
  cta.launch->progress();
  ++cta.launch->n.barriers;
}

// x[0] kind, x[1] aligned, x[2] has a count, x[3] predicate negated; a id, b count, c predicate
void barrier(Warp& w, const Inst& in, uint32_t m) {
  Cta& cta = *w.cta;
  w.needValid(in, in.a, m, "barrier number");
  const int lane = firstLane(m);
  const uint32_t id = lane32(w, in.a, (unsigned)lane);
  if (id > 15) w.fail(in, lane, "barrier ", id, " does not exist (0..15)");
  NamedBarrier& b = cta.bars[id];
  const unsigned count = in.x[2] ? lane32(w, in.b, (unsigned)lane) : 0;
  if (in.x[2] && (count == 0 || count % kLanes))
    w.fail(in, lane, "barrier ", id, ": a thread count of ", count, " is no multiple of 32");
  if (in.x[2] && count > (w.launch->warpsPerCta) * kLanes)
    w.fail(in, lane, "barrier ", id, ": a thread count of ", count, " in a CTA of ", w.launch->threads, " threads");
  if (b.arrived && (b.all != !in.x[2] || b.expected != count))
    w.fail(in, lane, "barrier ", id, " is used with ", (count ? std::to_string(count) : "all"),
           " threads while a phase with ", (b.all ? "all" : std::to_string(b.expected)), " threads is open");
  b.all = !in.x[2];
  b.expected = count;
  if (b.lanes.empty()) b.lanes.assign(cta.warps.size(), 0);
  if (b.lanes[w.index] & m) w.fail(in, lane, "warp ", w.index, " arrives twice at barrier ", id, " in one phase");
  b.lanes[w.index] |= m;
  const unsigned add = in.x[1] && in.x[2] ? kLanes : (unsigned)__builtin_popcount(m);
  b.arrived += add;
  if (in.x[0] >= RedPopc) {
    uint32_t p = (w.pred(in.c) ^ (in.x[3] ? kAll : 0)) & m;
    b.redCount += (uint32_t)__builtin_popcount(p);
    b.redAnd &= p == m ? kAll : 0;
    b.redOr |= p;
  }
  raceArrive(w, b);
  w.launch->progress();
  if (in.x[0] != Arrive) {
    Fragment& f = w.frag();
    if (f.mask != m) w.fail(in, lane, "a predicated barrier that only part of a fragment takes is not supported");
    b.waiting.push_back({&w, m, &in});
    f.wait = Wait::Barrier;
    f.describe = describeBarrier;
    f.shownPc = w.pc;
    w.reschedule = true;
  }
  const unsigned want = b.all ? cta.liveThreads : b.expected;
  if (b.arrived > want) w.fail(in, lane, "barrier ", id, ": ", b.arrived, " threads arrive at a phase of ", want);
  if (b.arrived == want) complete(cta, b);
}

// ---- cluster barrier

void clusterCheck(Cluster& c, Launch& l) {
  if (c.arrived && c.arrived >= c.liveThreads) {
    c.arrived = 0;
    ++c.barrierPhase;
    raceClusterDone(c);
    l.progress();
  }
}
std::string describeCluster(Warp& w, const Inst&) {
  return "waits at the cluster barrier: " + std::to_string(w.cta->cluster->arrived) + " of " +
         std::to_string(w.cta->cluster->liveThreads) + " threads have arrived";
}
void clusterArrive(Warp& w, const Inst& in, uint32_t m) {
  Cluster& c = *w.cta->cluster;
  if (w.clusterArrived & m) w.fail(in, firstLane(w.clusterArrived & m), "barrier.cluster.arrive twice without a wait");
  w.clusterArrived |= m;
  for (int i : lanesOf(m)) w.clusterPhase[i] = c.barrierPhase;
  c.arrived += (unsigned)__builtin_popcount(m);
  raceClusterArrive(w, in.x[0] == 0);
  w.launch->progress();
  clusterCheck(c, *w.launch);
}
void clusterWait(Warp& w, const Inst& in, uint32_t m) {
  Cluster& c = *w.cta->cluster;
  if (m & ~w.clusterArrived) w.fail(in, firstLane(m & ~w.clusterArrived), "barrier.cluster.wait without an arrive");
  for (int i : lanesOf(m))
    if (w.clusterPhase[i] == c.barrierPhase) {
      w.block(Wait::Poll, describeCluster);
      return;
    }
  w.clusterArrived &= ~m;
  raceClusterWait(w);
}

void decodeBarrier(Dec& d, bool aligned) {
  if (d.take("warp")) {
    d.take("sync");
    decodeWarpSync(d);
    return;
  }
  if (d.take("cluster")) {
    bool wait = d.takeOneOf({"arrive", "wait"}) == 1;
    d.out.x[0] = d.take("relaxed");
    d.take("release");
    d.take("acquire");
    d.out.convergeAll = d.take("aligned");
    d.wantArgs(0, 0);
    d.out.fn = wait ? clusterWait : clusterArrive;
    return;
  }
  d.take("cta");
  int kind = d.take("sync") ? Sync : d.take("arrive") ? Arrive : -1;
  size_t at = 0;
  if (d.take("red")) {
    int op = d.takeOneOf({"popc", "and", "or"});
    if (op < 0) d.fail("an operation is missing");
    kind = RedPopc + op;
    at = 1;
  }
  if (kind < 0) d.fail("sync, arrive or red is expected");
  d.out.convergeAll = d.take("aligned") || aligned;
  if (kind >= RedPopc) d.needType();
  const size_t extra = kind >= RedPopc ? 1 : 0;
  d.wantArgs(at + 1 + extra, at + 2 + extra);
  d.out.x[0] = (uint8_t)kind;
  d.out.x[1] = d.out.convergeAll;
  d.out.x[2] = d.argc() == at + 2 + extra;
  if (kind == Arrive && !d.out.x[2]) d.fail("a thread count is required");
  if (at) d.out.d = kind == RedPopc ? d.dst(0, 4) : d.predDst(d.arg(0));
  d.out.a = d.src(at, Type::U32);
  if (d.out.x[2]) d.out.b = d.src(at + 1, Type::U32);
  if (extra) {
    bool neg;
    d.out.c = d.pred(d.arg(d.argc() - 1), &neg);
    d.out.x[3] = neg;
  }
  d.out.fn = barrier;
}

}  // namespace

// Threads that left no longer count where all threads are waited for.
void barrierExit(Cta& cta) {
  for (auto& b : cta.bars)
    if (b.arrived && b.all && b.arrived >= cta.liveThreads) complete(cta, b);
}
void clusterExit(Warp& w, uint32_t mask) {
  Cluster& c = *w.cta->cluster;
  for (int i : lanesOf(mask & w.clusterArrived))
    if (w.clusterPhase[i] == c.barrierPhase && c.arrived) --c.arrived;
  w.clusterArrived &= ~mask;
  clusterCheck(c, *w.launch);
}

void addBarrierOps(OpTable& t) {
  t["bar"] = [](Dec& d) { decodeBarrier(d, true); };
  t["barrier"] = [](Dec& d) { decodeBarrier(d, false); };
}

}  // namespace ptxsim
