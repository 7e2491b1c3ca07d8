// Instructions in which the lanes of a warp exchange something (PTX ISA 9.7.9.6, 9.7.13.8 and on).
#include "async.h"

namespace ptxsim {
namespace {

// A .sync instruction with a member mask: every lane that runs it must be named, and it runs when all named lanes that
// have not exited are here. false: wait. The lanes of one fragment may hold different masks (each a group of its own).
std::string waitingLanes(Warp& w, const Inst&) {
  return cat("waits for lanes that never come (lanes here ", hex(w.frag().mask), ", live ", hex(w.live), ")");
}
bool gather(Warp& w, const Inst& in, Ref maskRef, uint32_t m) {
  w.needValid(in, maskRef, m, "member mask");
  for (uint32_t left = m; left;) {
    int i = firstLane(left);
    uint32_t member = lane32(w, maskRef, (unsigned)i);
    if (!((member >> i) & 1)) w.fail(in, i, "the lane is not in its own member mask");
    uint32_t need = member & w.live;
    if (need & ~m) {
      w.block(Wait::Converge, waitingLanes);
      return false;
    }
    left &= ~member;
  }
  return true;
}

// After the lanes named in b have come together (`sync`): f(lane, its group) gives what it gets in d and in the
// predicate, where these are, and of which lanes of the group Inst::a must be defined for that.
struct Exchanged {
  uint64_t value;
  bool flag;
  uint32_t needs;
};
template <class F>
void exchange(Warp& w, const Inst& in, uint32_t m, bool sync, Ref d, Ref predicate, F f) {
  if (sync && !gather(w, in, in.b, m)) return;
  uint32_t r[kLanes], flags = 0, valid = 0;
  for (int i : lanesOf(m)) {
    const uint32_t group = (sync ? lane32(w, in.b, (unsigned)i) : kAll) & m;
    const Exchanged got = f(i, group);
    r[i] = (uint32_t)got.value;
    flags |= (uint32_t)got.flag << i;
    valid |= (uint32_t)!(got.needs & ~(w.validOf(in.a) & group)) << i;
  }
  if (d) setLanes<uint32_t>(w, d, m, valid, [&](int i) { return r[i]; });
  if (predicate) w.setPred(predicate, m, flags, valid);
}

void shfl(Warp& w, const Inst& in, uint32_t m) {  // x[0] up down bfly idx, x[1] .sync; ext->refs: predicate?, distance
  const Ref predicate = in.ext->refs[0];
  exchange(w, in, m, in.x[1], in.d, predicate, [&](int i, uint32_t) {
    const int by = lane32(w, in.ext->refs[1], (unsigned)i) & 31, c = (int)lane32(w, in.c, (unsigned)i);
    const int segment = c >> 8 & 31, last = (i & segment) | (c & 31 & ~segment);
    const int from[] = {i - by, i + by, i ^ by, (i & segment) | (by & ~segment)};
    const bool ok = in.x[0] == 0 ? from[0] >= last : from[in.x[0]] <= last;
    const int j = ok ? from[in.x[0]] : i;
    return Exchanged{lane32(w, in.a, (unsigned)j), ok, 1u << j};
  });
  if (predicate) w.setValid(predicate, m, kAll);
}
template <bool kBallot>
void vote(Warp& w, const Inst& in, uint32_t m) {  // x[0] .sync, x[1] all any uni
  const uint32_t p = w.predicate(in.a);
  exchange(w, in, m, in.x[0], kBallot ? in.d : Ref(), kBallot ? Ref() : in.d, [&](int, uint32_t group) {
    const uint32_t set = p & group;
    return Exchanged{set, in.x[1] == 1 ? set != 0 : set == group || (in.x[1] == 2 && set == 0), group};
  });
}
void match(Warp& w, const Inst& in, uint32_t m) {  // x[0] any all
  auto value = [&](int lane) { return laneBits(w, in.a, in.bytes, lane); };
  exchange(w, in, m, true, in.d, in.ext->refs[0], [&](int i, uint32_t group) {
    uint32_t same = 0;
    for (int j : lanesOf(group)) same |= (uint32_t)(value(j) == value(i)) << j;
    return Exchanged{in.x[0] && same != group ? 0 : same, same == group, 1u << i};
  });
}
void redux(Warp& w, const Inst& in, uint32_t m) {  // x[0] operation
  exchange(w, in, m, true, in.d, Ref(), [&](int, uint32_t group) {
    uint64_t sum = lane32(w, in.a, (unsigned)firstLane(group));
    for (int j : lanesOf(group & (group - 1))) sum = atomicResult(in.x[0], in.type, sum, lane32(w, in.a, (unsigned)j));
    return Exchanged{sum, false, group};
  });
}
void elect(Warp& w, const Inst& in, uint32_t m) {  // the lowest member leads
  exchange(w, in, m, true, in.d, in.ext->refs[0],
           [](int i, uint32_t group) { return Exchanged{(uint64_t)firstLane(group), firstLane(group) == i, 0}; });
}

void warpSync(Warp& w, const Inst& in, uint32_t m) {
  if (gather(w, in, in.b, m)) laneSync(w, m);
}
void activemask(Warp& w, const Inst& in, uint32_t m) {
  setLanes<uint32_t>(w, in.d, m, kAll, [&](int) { return m; });
}

const Forms kForms = {
    {"shfl", "up|down|bfly|idx sync? type", "d:b32|p a:b32 e:u32 c:u32 b:b32", shfl},
    {"shfl", "up|down|bfly|idx type", "d:b32|p a:b32 e:u32 c:u32", shfl},
    {"vote", "sync? all|any|uni type", "d:pred a:pred b:b32?", vote<false>},
    {"vote", "sync? ballot type", "d:b32 a:pred b:b32?", vote<true>},
    {"match", "sync any|all type", "d:b32|p a b:b32", match},
    {"redux", "sync add|min|max|and|or|xor bits", "d:b32 a b:b32", redux},
    {"elect", "sync", "d:b32|p b:b32", elect},
    {"activemask", "type", "d:b32", activemask},
    {"bar|barrier", "warp sync", "b:b32", warpSync},
};

}  // namespace
}  // namespace ptxsim
