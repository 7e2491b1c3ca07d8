// Instructions in which the lanes of a warp exchange something (PTX ISA 9.7.9.6, 9.7.13.8 and on).
#include "async.h"

namespace ptxsim {
namespace {

// A .sync instruction with a member mask: every lane that runs it must be named, and it runs when all named lanes that
// have not exited are here. false: wait. The lanes of one fragment may hold different masks (each a group of its own).
std::string waitingLanes(Warp& w, const Inst&) {
  char s[96];
  const Fragment& f = w.frag();
  snprintf(s, sizeof s, "waits for lanes that never come (lanes here 0x%08x, live 0x%08x)", f.mask, w.live);
  return s;
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

// ext->refs: predicate?, mask. x[0] up down bfly idx, x[1] .sync
void shfl(Warp& w, const Inst& in, uint32_t m) {
  const Ref predicate = in.ext->refs[0];
  if (in.x[1] && !gather(w, in, in.ext->refs[1], m)) return;
  uint32_t p = 0, valid = 0;
  setLanes<uint32_t>(w, in.d, m, valid, [&](int i) {
    const int b = lane32(w, in.b, (unsigned)i) & 31, c = (int)lane32(w, in.c, (unsigned)i), segment = c >> 8 & 31;
    const int last = (i & segment) | (c & 31 & ~segment);
    const int from[] = {i - b, i + b, i ^ b, (i & segment) | (b & ~segment)};
    const bool ok = in.x[0] == 0 ? from[0] >= last : from[in.x[0]] <= last;
    const int j = ok ? from[in.x[0]] : i;
    p |= (uint32_t)ok << i;
    // A source lane that takes no part gives an undefined value.
    const uint32_t there = (in.x[1] ? lane32(w, in.ext->refs[1], (unsigned)i) : kAll) & m & w.validOf(in.a);
    valid |= (there >> j & 1) << i;
    return lane32(w, in.a, (unsigned)j);
  });
  if (predicate) w.setPred(predicate, m, p, kAll);
}

uint32_t group(Warp& w, const Inst& in, uint32_t m, int lane, bool sync = true) {
  return (sync ? lane32(w, in.b, (unsigned)lane) : kAll) & m;
}
// x[0] .sync, x[1] all any uni
void vote(Warp& w, const Inst& in, uint32_t m) {
  if (in.x[0] && !gather(w, in, in.b, m)) return;
  const uint32_t p = w.predicate(in.a), ok = w.validOf(in.a);
  uint32_t result = 0, valid = 0;
  for (int i : lanesOf(m)) {
    const uint32_t all = group(w, in, m, i, in.x[0]), set = p & all;
    result |= (uint32_t)((set == all && in.x[1] != 1) || (in.x[1] == 1 && set) || (in.x[1] == 2 && !set)) << i;
    valid |= (uint32_t)((ok & all) == all) << i;
  }
  w.setPred(in.d, m, result, valid);
}
void ballot(Warp& w, const Inst& in, uint32_t m) {
  if (in.x[0] && !gather(w, in, in.b, m)) return;
  uint32_t valid = 0;
  setLanes<uint32_t>(w, in.d, m, valid, [&](int i) {
    const uint32_t all = group(w, in, m, i, in.x[0]);
    valid |= (uint32_t)((w.validOf(in.a) & all) == all) << i;
    return w.predicate(in.a) & all;
  });
}

// x[0] any all; ext->refs: predicate?
template <class T>
void match(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  const T* a = w.ptr<const T>(in.a);
  const uint32_t valid = w.validOf(in.a);
  uint32_t p = 0;
  setLanes<uint32_t>(w, in.d, m, valid, [&](int i) {
    const uint32_t all = group(w, in, m, i);
    uint32_t same = 0;
    for (int j : lanesOf(all)) same |= (uint32_t)(a[j] == a[i]) << j;
    p |= (uint32_t)(same == all) << i;
    return in.x[0] && same != all ? 0 : same;
  });
  if (in.ext->refs[0]) w.setPred(in.ext->refs[0], m, p, valid);
}

// x[0] operation, x[1] type
void redux(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  uint32_t valid = 0;
  setLanes<uint32_t>(w, in.d, m, valid, [&](int i) {
    const uint32_t all = group(w, in, m, i), others = all & (all - 1);
    uint64_t sum = lane32(w, in.a, (unsigned)firstLane(all));
    for (int j : lanesOf(others)) sum = atomicResult(in.x[0], (Type)in.x[1], sum, lane32(w, in.a, (unsigned)j));
    valid |= (uint32_t)((w.validOf(in.a) & all) == all) << i;
    return sum;
  });
}

// The lowest member leads.
void elect(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  uint32_t p = 0;
  setLanes<uint32_t>(w, in.d, m, kAll, [&](int i) {
    const int leader = firstLane(group(w, in, m, i));
    p |= (uint32_t)(leader == i) << i;
    return leader;
  });
  if (in.ext->refs[0]) w.setPred(in.ext->refs[0], m, p, kAll);
}

void warpSync(Warp& w, const Inst& in, uint32_t m) {
  if (gather(w, in, in.b, m)) laneSync(w, m);
}
void activemask(Warp& w, const Inst& in, uint32_t m) {
  setLanes<uint32_t>(w, in.d, m, kAll, [&](int) { return m; });
}

const Forms kForms = {
    {"shfl", "up|down|bfly|idx sync? type", "d:b32|p a:b32 b:u32 c:u32 e:b32", shfl},
    {"shfl", "up|down|bfly|idx type", "d:b32|p a:b32 b:u32 c:u32", shfl},
    {"vote", "sync? all|any|uni type", "d:pred a:pred b:b32?", vote},
    {"vote", "sync? ballot type", "d:b32 a:pred b:b32?", ballot},
    {"match", "sync any|all type", "d:b32|p a b:b32",
     [](Dec& d) { d.out.fn = typeBytes(d.types[0]) == 8 ? match<uint64_t> : match<uint32_t>; }},
    {"redux", "sync add|min|max|and|or|xor bits", "d:b32 a b:b32",
     [](Dec& d) {
       d.out.x[1] = (uint8_t)d.types[0];
       d.out.fn = redux;
     }},
    {"elect", "sync", "d:b32|p b:b32", elect},
    {"activemask", "type", "d:b32", activemask},
    {"bar", "warp sync", "b:b32", warpSync},
    {"barrier", "warp sync", "b:b32", warpSync},
};

}  // namespace
}  // namespace ptxsim
