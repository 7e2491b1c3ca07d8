// ld, st and their relatives (PTX ISA 9.7.9), without atomics and asynchronous copies.
#include "access.h"
#include "ops.h"
#include "race.h"

namespace ptxsim {

void decodeStAsync(Dec&);

static const char* verb(Kind k) { return k == Kind::Read ? "read" : k == Kind::Write ? "write" : "atomic"; }
static std::string hex(uint64_t v) {
  char s[32];
  snprintf(s, sizeof s, "0x%llx", (unsigned long long)v);
  return s;
}

Place locateGlobal(Warp& w, const Inst& in, int lane, uint64_t a, uint32_t bytes, Kind kind, uint32_t align) {
  if (align > 1 && a % align)
    w.fail(in, lane, "misaligned ", verb(kind), " of ", bytes, " bytes: address ", Arena::get().describe(a, bytes),
           " is no multiple of ", align);
  Buffer* b = Arena::get().find(a, bytes);
  if (!b && w.launch->alias) {
    uint64_t moved = w.launch->alias(a, bytes);
    if (moved) b = Arena::get().find(a = moved, bytes);
  }
  if (!b)
    w.fail(in, lane, "out-of-bounds global ", verb(kind), " of ", bytes, " bytes at ", Arena::get().describe(a, bytes));
  if (kind != Kind::Read && !b->writable)
    w.fail(in, lane, "global ", verb(kind), " to buffer '", b->name, "', which this launch may only read (byte offset ",
           a - b->begin, ")");
  Place p;
  p.p = (uint8_t*)a;
  p.buffer = b;
  if (!b->valid.empty()) p.valid = b->valid.data() + (a - b->begin);
  return p;
}

Place locateShared(Warp& w, const Inst& in, int lane, uint32_t a, uint32_t bytes, Kind kind, uint32_t align, bool own) {
  uint32_t rank = a >> 24, off = a & 0xffffffu;
  if (align > 1 && off % align)
    w.fail(in, lane, "misaligned shared ", verb(kind), " of ", bytes, " bytes at shared offset ", hex(off),
           ": no multiple of ", align);
  if (own && rank != w.cta->rank && rank != 0)
    w.fail(in, lane, "shared::cta access with the address of CTA rank ", rank, " of the cluster (own rank ",
           w.cta->rank, "): .shared::cluster is needed");
  if (own) rank = w.cta->rank;
  auto& ctas = w.cta->cluster->ctas;
  if (rank >= ctas.size())
    w.fail(in, lane, "shared ", verb(kind), " at CTA rank ", rank, " of a cluster of ", ctas.size(), " (address ",
           hex(a), ")");
  Cta& c = *ctas[rank];
  if (off < kSharedReserved || off + bytes > c.smemBytes)
    w.fail(in, lane, "out-of-bounds shared ", verb(kind), " of ", bytes, " bytes at offset ", hex(off),
           ": the CTA's shared memory is [0x400, ", hex(c.smemBytes), ")");
  if (c.liveThreads == 0 && &c != w.cta)  // what a CTA leaves behind is checked when it exits
    w.fail(in, lane, "shared ", verb(kind), " to CTA rank ", rank, ", whose threads have all exited");
  Place p;
  p.p = c.smem + off;
  p.valid = c.smemValid + off;
  p.cta = &c;
  p.offset = off;
  return p;
}

Place locate(Warp& w, const Inst& in, int lane, Space space, uint64_t a, uint32_t bytes, Kind kind, uint32_t align) {
  if (space == Space::Shared) return locateShared(w, in, lane, (uint32_t)a, bytes, kind, align, in.x[4] == 0);
  if (space == Space::Generic || space == Space::Param) {
    if (inShared(a)) return locateShared(w, in, lane, (uint32_t)a, bytes, kind, align, false);
    if (inLocal(a)) space = Space::Local, a = (uint32_t)a;
  }
  if (space == Space::Local) {
    if (align > 1 && a % align) w.fail(in, lane, "misaligned local ", verb(kind), " at offset ", hex(a));
    if (a < 16 || a + bytes > w.kernel->localBytes)
      w.fail(in, lane, "out-of-bounds local ", verb(kind), " at offset ", hex(a), " of ", w.kernel->localBytes,
             " bytes");
    Place p;
    p.p = w.local + (size_t)lane * w.kernel->localBytes + a;
    p.valid = w.localValid + (size_t)lane * w.kernel->localBytes + a;
    return p;
  }
  return locateGlobal(w, in, lane, a, bytes, kind, align);
}

void addresses(Warp& w, const Inst& in, uint32_t m, uint64_t* out) {
  if (in.x[5] == 4) {
    const uint32_t* a = w.ptr<const uint32_t>(in.a);
    for (unsigned i = 0; i < kLanes; ++i) out[i] = (uint64_t)((int64_t)a[i] + in.imm);
  } else {
    const uint64_t* a = w.ptr<const uint64_t>(in.a);
    for (unsigned i = 0; i < kLanes; ++i) out[i] = a[i] + (uint64_t)in.imm;
  }
  if (m & ~w.validOf(in.a)) w.needValid(in, in.a, m, "address");
}

static void countBanks(Warp& w, uint32_t m, const uint64_t* a, uint32_t bytes) {
  // A warp's access is served in groups of lanes that together move 128 bytes.
  const unsigned group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (unsigned g = 0; g < kLanes; g += group) {
    uint32_t seen[32][8], n[32] = {0}, most = 0;
    bool any = false;
    for (unsigned i = g; i < g + group; ++i) {
      if (!((m >> i) & 1)) continue;
      any = true;
      for (uint32_t b = 0; b < bytes; b += 4) {
        uint32_t word = (uint32_t)(a[i] + b) >> 2, bank = word & 31;
        bool dup = false;
        for (unsigned k = 0; k < n[bank] && k < 8; ++k) dup |= seen[bank][k] == word;
        if (dup) continue;
        if (n[bank] < 8) seen[bank][n[bank]] = word;
        most = std::max(most, ++n[bank]);
      }
    }
    w.launch->n.sharedWavefronts += most;
    w.launch->n.sharedIdeal += any;
  }
}

void place(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* a, uint32_t bytes, Kind kind, Span& s) {
  Launch& l = *w.launch;
  if (space == Space::Generic) {  // one window for all lanes is the rule
    bool same = true;
    for (int i : lanesOf(m)) same &= a[i] >> 32 != 1 && a[i] >> 32 != 2;
    if (same) space = Space::Global;
  }
  const uint32_t total = bytes * (uint32_t)__builtin_popcount(m);
  if (space == Space::Shared && in.x[4] == 0) {
    Cta& c = *w.cta;
    const uint32_t base = c.rank << 24;
    for (int i : lanesOf(m)) {
      uint32_t off = (uint32_t)a[i] & 0xffffffu, top = (uint32_t)a[i] & 0xff000000u;
      if ((top != base && top != 0) || off < kSharedReserved || off + bytes > c.smemBytes || (off & (bytes - 1)))
        locateShared(w, in, i, (uint32_t)a[i], bytes, kind, bytes, true);
      if (kind != Kind::Read && (c.mbarIndex[off >> 3] || c.mbarIndex[(off + bytes - 1) >> 3]))
        w.fail(in, i, "ordinary ", verb(kind), " to a live mbarrier at shared offset ", hex(off));
      s.p[i] = c.smem + off;
      s.v[i] = c.smemValid + off;
    }
    s.tracked = true;
    (kind == Kind::Read ? l.n.sharedRead : l.n.sharedWrite) += total;
    if (l.opt.verbose) countBanks(w, m, a, bytes);
  } else if (space == Space::Global) {
    Buffer* b = Arena::get().find(a[__builtin_ctz(m)], bytes);
    if (b && (kind != Kind::Read && !b->writable)) b = nullptr;
    for (int i : lanesOf(m)) {
      if (!b || a[i] < b->begin || a[i] + bytes > b->end || (a[i] & (bytes - 1)) || !b->valid.empty()) {
        Place p = locateGlobal(w, in, i, a[i], bytes, kind, bytes);
        s.p[i] = p.p;
        s.v[i] = p.valid;
        s.tracked |= p.valid != nullptr;
      } else {
        s.p[i] = (uint8_t*)a[i];
        s.v[i] = nullptr;
      }
    }
    (kind == Kind::Read ? l.n.globalRead : kind == Kind::Write ? l.n.globalWrite : l.n.atomics) += total;
  } else {
    for (int i : lanesOf(m)) {
      Place p = locate(w, in, i, space, a[i], bytes, kind, bytes);
      s.p[i] = p.p;
      s.v[i] = p.valid;
      s.tracked |= p.valid != nullptr;
    }
    if (space == Space::Generic) (kind == Kind::Read ? l.n.globalRead : l.n.globalWrite) += total;
  }
}
void resolve(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* a, uint32_t bytes, Kind kind, Span& s) {
  place(w, in, m, space, a, bytes, kind, s);
  if (w.launch->race) raceAccess(w, in, m, space, a, bytes, kind);
}

namespace {

struct B128 {
  uint64_t v[2];
};

template <class M, class R>
void load(Warp& w, const Inst& in, uint32_t m) {
  uint64_t a[kLanes];
  Span s;
  addresses(w, in, m, a);
  const unsigned n = in.vec;
  resolve(w, in, m, in.space, a, n * (uint32_t)sizeof(M), Kind::Read, s);
  const Ref* refs = n == 1 ? &in.d : in.ext->refs.data();
  for (unsigned k = 0; k < n; ++k) {
    R* d = w.ptr<R>(refs[k]);
    uint32_t bad = 0;
    for (int i : lanesOf(m)) {
      M v;
      memcpy(&v, s.p[i] + k * sizeof(M), sizeof(M));
      if constexpr (std::is_same<M, B128>::value)
        d[i] = v;
      else
        d[i] = (R)v;
      if (s.tracked && !allValid(s.v[i] ? s.v[i] + k * sizeof(M) : nullptr, sizeof(M))) bad |= 1u << i;
    }
    w.setValid(refs[k], m, ~bad);
  }
}

template <class M, class R>
void store(Warp& w, const Inst& in, uint32_t m) {
  uint64_t a[kLanes];
  Span s;
  addresses(w, in, m, a);
  const unsigned n = in.vec;
  place(w, in, m, in.space, a, n * (uint32_t)sizeof(M), Kind::Write, s);
  uint32_t changed = 0;
  const Ref* refs = n == 1 ? &in.d : in.ext->refs.data();
  for (unsigned k = 0; k < n; ++k) {
    const R* d = w.ptr<const R>(refs[k]);
    const uint32_t valid = w.validOf(refs[k]);
    if (m & ~valid && w.launch->opt.detect)
      for (int i : lanesOf(m & ~valid))
        if (!s.tracked || !s.v[i] || in.space == Space::Global)
          w.fail(in, i, "an uninitialised value is stored to global memory");
    for (int i : lanesOf(m)) {
      M v;
      if constexpr (std::is_same<M, B128>::value)
        v = d[i];
      else
        v = (M)d[i];
      if (memcmp(s.p[i] + k * sizeof(M), &v, sizeof(M))) {
        changed |= 1u << i;
        memcpy(s.p[i] + k * sizeof(M), &v, sizeof(M));
      }
      if (s.tracked && s.v[i]) memset(s.v[i] + k * sizeof(M), (valid >> i) & 1, sizeof(M));
    }
  }
  if (w.launch->race) raceWrites(w, in, m, changed, in.space, a, n * (uint32_t)sizeof(M));
  w.launch->progress();
}

// ld.param of an entry parameter at a constant address: the same for every lane, checked when decoded.
template <class M, class R>
void loadParam(Warp& w, const Inst& in, uint32_t m) {
  const Ref* refs = in.vec == 1 ? &in.d : in.ext->refs.data();
  for (unsigned k = 0; k < in.vec; ++k) {
    M v;
    memcpy(&v, (const uint8_t*)in.imm + k * sizeof(M), sizeof(M));
    R* d = w.ptr<R>(refs[k]);
    for (unsigned i = 0; i < kLanes; ++i) d[i] = (m >> i) & 1 ? (R)v : d[i];
    w.setValid(refs[k], m, kAll);
  }
}

template <template <class, class> class H>
Handler pick(Type t, unsigned reg) {
#define ROW(type, M)                                                                                      \
  case type:                                                                                              \
    return reg == 2   ? (Handler)H<M, uint16_t>::f                                                        \
           : reg == 4 ? (Handler)H<M, std::conditional_t<std::is_signed<M>::value, int32_t, uint32_t>>::f \
                      : (Handler)H<M, std::conditional_t<std::is_signed<M>::value, int64_t, uint64_t>>::f;
  switch (t) {
    ROW(Type::B8, uint8_t)
    ROW(Type::U8, uint8_t)
    ROW(Type::S8, int8_t)
    ROW(Type::B16, uint16_t)
    ROW(Type::U16, uint16_t)
    ROW(Type::F16, uint16_t)
    ROW(Type::BF16, uint16_t)
    ROW(Type::S16, int16_t)
    ROW(Type::B32, uint32_t)
    ROW(Type::U32, uint32_t)
    ROW(Type::F32, uint32_t)
    ROW(Type::F16x2, uint32_t)
    ROW(Type::BF16x2, uint32_t)
    ROW(Type::S32, int32_t)
    ROW(Type::B64, uint64_t)
    ROW(Type::U64, uint64_t)
    ROW(Type::F64, uint64_t)
    ROW(Type::S64, int64_t)
    default: return nullptr;
  }
#undef ROW
}
template <class M, class R>
struct Load {
  static void f(Warp& w, const Inst& in, uint32_t m) { load<M, R>(w, in, m); }
};
template <class M, class R>
struct Store {
  static void f(Warp& w, const Inst& in, uint32_t m) { store<M, R>(w, in, m); }
};
template <class M, class R>
struct LoadParam {
  static void f(Warp& w, const Inst& in, uint32_t m) { loadParam<M, R>(w, in, m); }
};

}  // namespace

// .weak .relaxed .acquire ... .cta .gpu ..., state space, cache hints. Returns the number of trailing hint operands.
size_t takeMemoryModifiers(Dec& d, bool isLoad) {
  static const char* kSpaceNames[] = {"global",       "shared",      "shared::cta", "shared::cluster", "local", "param",
                                      "param::entry", "param::func", "const"};
  static const Space kSpaceOf[] = {Space::Global, Space::Shared, Space::Shared, Space::Shared, Space::Local,
                                   Space::Param,  Space::Param,  Space::Param,  Space::Const};
  d.out.space = Space::Generic;
  for (int i = 0; i < 9; ++i)
    if (d.take(kSpaceNames[i])) {
      d.out.space = kSpaceOf[i];
      if (i == 3) d.out.x[4] = 1;  // any CTA of the cluster
      break;
    }
  int sem = d.takeOneOf({"weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"});
  d.out.x[0] = (uint8_t)(sem < 0 ? 0 : sem);
  int scope = d.takeOneOf({"cta", "cluster", "gpu", "sys"});
  d.out.x[1] = (uint8_t)(scope < 0 ? 3 : scope);
  if (sem > 0 && sem < 5 && scope < 0) d.fail("a scope is missing");
  d.take("mmio");
  if (isLoad) d.take("nc");
  d.takeOneOf({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  d.takePrefix("L1::");
  bool hint = d.take("L2::cache_hint");
  d.takePrefix("L2::");
  d.take("unified");
  return hint ? 1 : 0;
}

namespace {

void checkParamBounds(Dec& d, const Operand& a, unsigned bytes) {
  const Operand& s = a.sub[0];
  if (s.i < 0 || (uint64_t)s.i + bytes > s.var->bytes) d.fail("reads past the end of parameter ", s.var->name);
}

void loadStore(Dec& d, bool isLoad) {
  size_t hints = takeMemoryModifiers(d, isLoad);
  if (d.has("v2") || d.has("v4") || d.has("v8")) d.out.vec = (uint8_t)(2u << d.takeOneOf({"v2", "v4", "v8"}));
  Type t = d.needType();
  d.wantArgs(2 + hints, 2 + hints);
  const Operand& mem = d.arg(isLoad ? 0u + 1 : 0);
  const Operand& reg = d.arg(isLoad ? 0 : 1);
  if (mem.kind != Operand::Address) d.fail("an address in brackets is expected");
  unsigned width = 0;
  auto one = [&](const Operand& o) -> Ref {
    if (isLoad) {
      if (o.kind == Operand::Sink) return d.dst(o, 8);
      unsigned b = d.regBytes(o);
      if (b < typeBytes(t)) d.fail("the register is narrower than the access");
      if (width && width != b) d.fail("registers of one vector have different widths");
      width = b;
      return d.dst(o, 0);
    }
    unsigned b;
    Ref r = d.srcWide(o, t, &b);
    if (b < typeBytes(t)) d.fail("the register is narrower than the access");
    if (width && width != b) d.fail("registers of one vector have different widths");
    width = b;
    return r;
  };
  if (d.out.vec > 1) {
    if (reg.kind != Operand::Vector || reg.sub.size() != d.out.vec)
      d.fail("a vector of ", d.out.vec, " registers is expected");
    for (auto& e : reg.sub) d.extra()->refs.push_back(one(e));
  } else {
    const Operand& o = reg.kind == Operand::Vector && reg.sub.size() == 1 ? reg.sub[0] : reg;
    d.out.d = one(o);
  }
  if (width == 0) width = std::max(2u, typeBytes(t));  // all sinks
  d.out.bytes = (uint8_t)typeBytes(t);
  d.out.x[3] = (uint8_t)t;
  const Operand& base = mem.sub[0];
  if (isLoad && d.out.space == Space::Param && base.kind == Operand::Symbol && d.kb.isEntryParam(*base.var) &&
      t != Type::B128) {
    checkParamBounds(d, mem, typeBytes(t) * d.out.vec);
    d.out.imm = (int64_t)d.kb.k.params + d.kb.params[base.var] + base.i;
    if (d.out.imm % (typeBytes(t) * d.out.vec)) d.fail("misaligned parameter access");
    d.out.fn = pick<LoadParam>(t, width);
    return;
  }
  if (!isLoad && d.out.space == Space::Const) d.fail("constant memory cannot be written");
  d.out.a = d.address(mem, &d.out.imm);
  if (d.out.space == Space::Const) d.out.space = Space::Global;
  if (t == Type::B128) {
    d.out.fn = isLoad ? (Handler)load<B128, B128> : (Handler)store<B128, B128>;
    return;
  }
  d.out.storesD = !isLoad;
  d.out.fn = isLoad ? pick<Load>(t, width) : pick<Store>(t, width);
}

void nothing(Warp&, const Inst&, uint32_t) {}
template <uint64_t V>
void constant64(Warp& w, const Inst& in, uint32_t m) {
  uint64_t r[kLanes];
  for (auto& x : r) x = V;
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, kAll);
}

// mapa: the shared address `a` in the CTA of rank b. x[0]: 0 shared::cluster 32/64 bits, 1 generic
void mapa(Warp& w, const Inst& in, uint32_t m) {
  uint64_t a[kLanes], r[kLanes];
  loadLanes(w, in.a, in.x[5], a);
  for (int i : lanesOf(m)) {
    uint32_t rank = lane32(w, in.b, (unsigned)i);
    if (rank >= w.cta->cluster->ctas.size())
      w.fail(in, i, "mapa to CTA rank ", rank, " of a cluster of ", w.cta->cluster->ctas.size());
    if (in.x[0] && !inShared(a[i])) w.fail(in, i, "mapa of a generic address that is not in shared memory");
    r[i] = (a[i] & ~0xff000000ull) | (uint64_t)rank << 24;
  }
  putLanes(w, in.d, in.x[5], r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b));
}
void getctarank(Warp& w, const Inst& in, uint32_t m) {
  uint64_t a[kLanes];
  loadLanes(w, in.a, in.x[5], a);
  uint32_t r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (uint32_t)a[i] >> 24;
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
}

}  // namespace

void addMemoryOps(OpTable& t) {
  t["ld"] = [](Dec& d) { loadStore(d, true); };
  t["ldu"] = [](Dec& d) { loadStore(d, true); };
  t["st"] = [](Dec& d) {
    if (d.take("async")) {
      decodeStAsync(d);
      return;
    }
    loadStore(d, false);
  };
  auto ignore = [](Dec& d) {
    for (size_t i = 0; i < d.used.size(); ++i) d.used[i] = true;
    d.out.fn = nothing;
  };
  t["prefetch"] = ignore;
  t["prefetchu"] = ignore;
  t["applypriority"] = ignore;
  t["pmevent"] = ignore;
  t["createpolicy"] = [](Dec& d) {
    for (size_t i = 0; i < d.used.size(); ++i) d.used[i] = true;
    d.out.d = d.dst(0, 8);
    d.out.fn = constant64<0x1000000000000000ull>;
  };
  t["mapa"] = [](Dec& d) {
    d.out.x[0] = !d.take("shared::cluster");
    Type ty = d.needType();
    d.wantArgs(3, 3);
    d.out.d = d.dst(0, typeBytes(ty));
    d.out.a = d.src(1, ty);
    d.out.b = d.src(2, Type::U32);
    d.out.x[5] = (uint8_t)typeBytes(ty);
    d.out.fn = mapa;
  };
  t["getctarank"] = [](Dec& d) {
    d.take("shared::cluster");
    Type ty = d.needType();
    d.wantArgs(2, 2);
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, ty);
    d.out.x[5] = (uint8_t)typeBytes(ty);
    d.out.fn = getctarank;
  };
}

}  // namespace ptxsim
