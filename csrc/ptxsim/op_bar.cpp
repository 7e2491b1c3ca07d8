// Named barriers of a CTA and the cluster barrier (PTX ISA 9.7.13.1 to 9.7.13.4).
#include "race.h"

namespace ptxsim {
namespace {

enum { Sync, Arrive, Red };  // x[0]
enum { Popc = 1, And, Or };  // x[1]

unsigned wanted(const Cta& cta, const NamedBarrier& b) { return b.expected ? b.expected : cta.liveThreads; }
std::string describeBarrier(Warp& w, const Inst& in) {
  const unsigned id = lane32(w, in.a, (unsigned)firstLane(w.frag().mask)) & 15;
  const NamedBarrier& b = w.cta->bars[id];
  return cat("waits at barrier ", id, ": ", b.arrived, " of ", wanted(*w.cta, b), " threads have arrived");
}

void complete(Cta& cta, NamedBarrier& b) {
  for (auto& x : b.waiting) {
    raceAcquire(*x.warp, b.clock);
    laneSync(*x.warp, x.mask);
    for (auto& f : x.warp->frags)
      if (f.wait == Wait::Barrier && f.mask == x.mask) f.wait = Wait::None;
    const Inst& in = *x.inst;
    if (in.x[1] == Popc) setLanes<uint32_t>(*x.warp, in.d, x.mask, kAll, [&](int) { return b.redCount; });
    if (in.x[1] == And || in.x[1] == Or)
      x.warp->setPred(in.d, x.mask, (in.x[1] == And ? b.redAnd : b.redCount > 0) ? kAll : 0, kAll);
  }
  b = NamedBarrier();
  cta.launch->progress();
  ++cta.launch->n.barriers;
}

// a: number, b: thread count, if any, c: predicate
void barrier(Warp& w, const Inst& in, uint32_t m) {
  Cta& cta = *w.cta;
  w.needValid(in, in.a, m, "barrier number");
  const int lane = firstLane(m);
  const uint32_t id = lane32(w, in.a, (unsigned)lane);
  if (id > 15) w.fail(in, lane, "barrier ", id, " does not exist (0..15)");
  NamedBarrier& b = cta.bars[id];
  const unsigned count = in.b ? lane32(w, in.b, (unsigned)lane) : 0;  // 0: all
  if (in.b && (count == 0 || count % kLanes))
    w.fail(in, lane, "barrier ", id, ": a thread count of ", count, " is no multiple of 32");
  if (count > w.launch->warpsPerCta * kLanes)
    w.fail(in, lane, "barrier ", id, ": a thread count of ", count, " in a CTA of ", w.launch->threads, " threads");
  auto name = [](unsigned n) { return n ? cat(n) : "all"; };
  if (b.arrived && b.expected != count)
    w.fail(in, lane, "barrier ", id, " is used with ", name(count), " threads while a phase with ", name(b.expected),
           " threads is open");
  b.expected = count;
  if (b.lanes.empty()) b.lanes.assign(cta.warps.size(), 0);
  if (b.lanes[w.index] & m) w.fail(in, lane, "warp ", w.index, " arrives twice at barrier ", id, " in one phase");
  b.lanes[w.index] |= m;
  b.arrived += in.convergeAll && count ? kLanes : (unsigned)__builtin_popcount(m);
  if (in.x[0] == Red) {
    const uint32_t p = w.predicate(in.c) & m;
    b.redCount += (uint32_t)__builtin_popcount(p);
    b.redAnd &= p == m;
  }
  raceRelease(w, b.clock);
  w.launch->progress();
  if (in.x[0] != Arrive) {
    if (w.frag().mask != m)
      w.fail(in, lane, "a predicated barrier that only part of a fragment takes is not supported");
    b.waiting.push_back({&w, m, &in});
    w.block(Wait::Barrier, describeBarrier);
    w.frag().shownPc = w.pc;
    w.next = w.pc + 1;  // where it goes on
  }
  const unsigned want = wanted(cta, b);
  if (b.arrived > want) w.fail(in, lane, "barrier ", id, ": ", b.arrived, " threads arrive at a phase of ", want);
  if (b.arrived == want) complete(cta, b);
}

// ---- cluster barrier

void clusterCheck(Cluster& c, Launch& l) {
  if (!c.arrived || c.arrived < c.liveThreads) return;
  c.arrived = 0;
  ++c.barrierPhase;
  c.done = std::exchange(c.clock, nullptr);
  l.progress();
}
std::string describeCluster(Warp& w, const Inst&) {
  const Cluster& c = *w.cta->cluster;
  return cat("waits at the cluster barrier: ", c.arrived, " of ", c.liveThreads, " threads have arrived");
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
    if (w.clusterPhase[i] == c.barrierPhase) return w.block(Wait::Poll, describeCluster);
  w.clusterArrived &= ~m;
  raceClusterWait(w);
}

void decodeBarrier(Dec& d) {
  const bool red = d.out.x[0] == Red;
  if (red && !d.out.x[1]) d.fail("an operation is missing");
  if (red) d.needType();
  d.wantArgs(red ? 3 : 1, red ? 4 : 2);
  if (red)
    d.operands(cat(d.out.x[1] == Popc ? "d:u32" : "d:pred", " a:u32", d.argc() == 4 ? " b:u32" : "", " c:pred"));
  else
    d.operands("a:u32 b:u32?");
  if (d.out.x[0] == Arrive && !d.out.b) d.fail("a thread count is required");
  d.out.convergeAll |= d.p.op[0] == "bar";
  d.out.fn = barrier;
}

const Forms kForms = {
    {"bar|barrier", "cluster arrive relaxed? (release) aligned?", "", clusterArrive},
    {"bar|barrier", "cluster wait (acquire) aligned?", "", clusterWait},
    {"bar|barrier", "sync|arrive|red popc|and|or? (cta) aligned?", nullptr, decodeBarrier},
};

}  // namespace

// Threads that left no longer count where all threads are waited for.
void barrierExit(Cta& cta) {
  for (auto& b : cta.bars)
    if (b.arrived && !b.expected && b.arrived >= cta.liveThreads) complete(cta, b);
}
void clusterExit(Warp& w, uint32_t mask) {
  Cluster& c = *w.cta->cluster;
  for (int i : lanesOf(mask & w.clusterArrived))
    if (w.clusterPhase[i] == c.barrierPhase && c.arrived) --c.arrived;
  w.clusterArrived &= ~mask;
  clusterCheck(c, *w.launch);
}

}  // namespace ptxsim
