// Instructions in which the lanes of a warp exchange something (PTX ISA 9.7.9.6, 9.7.13.8 and on).
#include "ops.h"
#include "race.h"

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

// shfl.sync: x[0] mode (up down bfly idx), refs: {predicate?, mask}
void shfl(Warp& w, const Inst& in, uint32_t m) {
  Ref mask = in.ext->refs[1];
  if (in.x[1] && !gather(w, in, mask, m)) return;
  uint32_t r[kLanes], p = 0, v = 0;
  const uint32_t srcValid = w.validOf(in.a);
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint32_t b = lane32(w, in.b, i) & 31, c = lane32(w, in.c, i);
    uint32_t seg = (c >> 8) & 31, cval = c & 31;
    uint32_t maxLane = (i & seg) | (cval & ~seg), minLane = i & seg;
    int32_t j;
    bool ok;
    switch (in.x[0]) {
      case 0:
        j = (int32_t)i - (int32_t)b;
        ok = j >= (int32_t)maxLane;
        break;
      case 1:
        j = (int32_t)(i + b);
        ok = j <= (int32_t)maxLane;
        break;
      case 2:
        j = (int32_t)(i ^ b);
        ok = j <= (int32_t)maxLane;
        break;
      default:
        j = (int32_t)(minLane | (b & ~seg));
        ok = j <= (int32_t)maxLane;
        break;
    }
    if (!ok) j = (int32_t)i;
    r[i] = lane32(w, in.a, (unsigned)j & 31);
    p |= (uint32_t)ok << i;
    // A source lane that takes no part gives an undefined value.
    bool there = in.x[1] ? (lane32(w, mask, i) >> j) & (m >> j) & 1 : (m >> j) & 1;
    v |= (uint32_t)(there && ((srcValid >> j) & 1)) << i;
  }
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, v);
  if (in.x[2]) {
    w.setPred(in.ext->refs[0], m, p, kAll);
  }
}

// vote.sync: x[0] all any uni ballot
void vote(Warp& w, const Inst& in, uint32_t m) {
  if (in.x[1] && !gather(w, in, in.b, m)) return;
  uint32_t p = w.pred(in.a) ^ (in.x[2] ? kAll : 0), ok = w.validOf(in.a), r[kLanes], out = 0, v = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint32_t group = (in.x[1] ? lane32(w, in.b, i) : kAll) & m;
    bool t = in.x[0] == 0   ? (p & group) == group
             : in.x[0] == 1 ? (p & group) != 0
                            : (p & group) == 0 || (p & group) == group;
    out |= (uint32_t)t << i;
    r[i] = p & group;
    v |= (uint32_t)((ok & group) == group) << i;
  }
  if (in.x[0] == 3) {
    storeLanes(w, in.d, r, m);
  } else {
    w.setPred(in.d, m, out, v);
  }
  w.setValid(in.d, m, v);
}

// match.sync: x[0] 0 any, 1 all; x[1] bytes
void match(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  uint64_t a[kLanes];
  loadLanes(w, in.a, in.x[1], a);
  uint32_t r[kLanes], p = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint32_t group = lane32(w, in.b, i) & m, same = 0;
    for (unsigned j = 0; j < kLanes; ++j)
      if ((group >> j) & 1 && a[j] == a[i]) same |= 1u << j;
    r[i] = in.x[0] ? (same == group ? group : 0) : same;
    p |= (uint32_t)(same == group) << i;
  }
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
  if (in.x[2]) {
    w.setPred(in.ext->refs[0], m, p, w.validOf(in.a));
  }
}

// redux.sync: x[0] add min max and or xor, x[1] signed
void redux(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  uint32_t r[kLanes], v = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint32_t group = lane32(w, in.b, i) & m, acc = lane32(w, in.a, (unsigned)firstLane(group));
    for (int j : lanesOf(group & (group - 1))) {
      const uint32_t x = lane32(w, in.a, (unsigned)j);
      switch (in.x[0]) {
        case 0: acc += x; break;
        case 1: acc = in.x[1] ? (uint32_t)std::min((int32_t)acc, (int32_t)x) : std::min(acc, x); break;
        case 2: acc = in.x[1] ? (uint32_t)std::max((int32_t)acc, (int32_t)x) : std::max(acc, x); break;
        case 3: acc &= x; break;
        case 4: acc |= x; break;
        default: acc ^= x; break;
      }
    }
    r[i] = acc;
    v |= (uint32_t)((w.validOf(in.a) & group) == group) << i;
  }
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, v);
}

// elect.sync d|p, mask: the lowest member leads
void elect(Warp& w, const Inst& in, uint32_t m) {
  if (!gather(w, in, in.b, m)) return;
  uint32_t r[kLanes], p = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint32_t leader = (uint32_t)firstLane(lane32(w, in.b, i) & m);
    r[i] = leader;
    p |= (uint32_t)(leader == i) << i;
  }
  if (in.x[0]) {
    storeLanes(w, in.d, r, m);
    w.setValid(in.d, m, kAll);
  }
  w.setPred(in.ext->refs[0], m, p, kAll);
}

void warpSync(Warp& w, const Inst& in, uint32_t m) {
  if (gather(w, in, in.b, m)) laneSync(w, m);
}
void activemask(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r[kLanes];
  for (auto& x : r) x = m;
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, kAll);
}

}  // namespace

bool gatherLanes(Warp& w, const Inst& in, Ref maskRef, uint32_t m) { return gather(w, in, maskRef, m); }

void decodeWarpSync(Dec& d) {  // bar.warp.sync
  d.wantArgs(1, 1);
  d.out.b = d.src(0, Type::B32);
  d.out.fn = warpSync;
}

void addWarpOps(OpTable& t) {
  t["shfl"] = [](Dec& d) {
    bool sync = d.take("sync");
    int mode = d.takeOneOf({"up", "down", "bfly", "idx"});
    if (mode < 0) d.fail("a mode is missing");
    d.needType();
    d.wantArgs(sync ? 5 : 4, sync ? 5 : 4);
    const Operand& o = d.arg(0);
    Ref p{};
    if (o.kind == Operand::Pair) {
      d.out.d = d.dst(o.sub[0], 4);
      p = d.predDst(o.sub[1]);
      d.out.x[2] = 1;
    } else {
      d.out.d = d.dst(o, 4);
    }
    d.out.a = d.src(1, Type::B32);
    d.out.b = d.src(2, Type::U32);
    d.out.c = d.src(3, Type::U32);
    d.extra()->refs = {p, sync ? d.src(4, Type::B32) : Ref{}};
    d.out.x[0] = (uint8_t)mode;
    d.out.x[1] = sync;
    d.out.fn = shfl;
  };
  t["vote"] = [](Dec& d) {
    bool sync = d.take("sync"), neg;
    int mode = d.takeOneOf({"all", "any", "uni", "ballot"});
    d.needType();
    d.wantArgs(sync ? 3 : 2, sync ? 3 : 2);
    d.out.d = mode == 3 ? d.dst(0, 4) : d.predDst(d.arg(0));
    d.out.a = d.pred(d.arg(1), &neg);
    if (sync) d.out.b = d.src(2, Type::B32);
    d.out.x[0] = (uint8_t)mode;
    d.out.x[1] = sync;
    d.out.x[2] = neg;
    d.out.fn = vote;
  };
  t["match"] = [](Dec& d) {
    int mode = d.takeOneOf({"any", "all"});
    if (!d.take("sync")) d.fail(".sync is required");
    Type ty = d.needType();
    d.wantArgs(3, 3);
    const Operand& o = d.arg(0);
    d.out.d = d.dst(o.kind == Operand::Pair ? o.sub[0] : o, 4);
    if (o.kind == Operand::Pair) {
      d.extra()->refs = {d.predDst(o.sub[1])};
      d.out.x[2] = 1;
    }
    d.out.a = d.src(1, ty);
    d.out.b = d.src(2, Type::B32);
    d.out.x[0] = (uint8_t)mode;
    d.out.x[1] = (uint8_t)typeBytes(ty);
    d.out.fn = match;
  };
  t["redux"] = [](Dec& d) {
    if (!d.take("sync")) d.fail(".sync is required");
    int op = d.takeOneOf({"add", "min", "max", "and", "or", "xor"});
    Type ty = d.needType();
    if (op < 0 || isFloat(ty)) d.fail("no such reduction on sm_90");
    d.wantArgs(3, 3);
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, ty);
    d.out.b = d.src(2, Type::B32);
    d.out.x[0] = (uint8_t)op;
    d.out.x[1] = ty == Type::S32;
    d.out.fn = redux;
  };
  t["elect"] = [](Dec& d) {
    if (!d.take("sync")) d.fail(".sync is required");
    d.wantArgs(2, 2);
    const Operand& o = d.arg(0);
    if (o.kind != Operand::Pair) d.fail("the destination is a register and a predicate");
    d.out.x[0] = o.sub[0].kind == Operand::Register;
    d.out.d = d.dst(o.sub[0], 4);
    d.extra()->refs = {d.predDst(o.sub[1])};
    d.out.b = d.src(1, Type::B32);
    d.out.fn = elect;
  };
  t["activemask"] = [](Dec& d) {
    d.needType();
    d.out.d = d.dst(0, 4);
    d.out.fn = activemask;
  };
}

}  // namespace ptxsim
