// ld, st and their relatives (PTX ISA 9.7.9), without atomics and asynchronous copies.
#include <set>

#include "async.h"

namespace ptxsim {

static const char* verb(Kind k) { return k == Kind::Read ? "read" : k == Kind::Write ? "write" : "atomic"; }
std::string hex(uint64_t v) {
  char s[32];
  snprintf(s, sizeof s, "0x%llx", (unsigned long long)v);
  return s;
}

Place locateGlobal(Warp& w, const Inst& in, int lane, uint64_t a, uint32_t bytes, Kind kind, uint32_t align) {
  if (a % align)
    w.fail(in, lane, "misaligned ", verb(kind), " of ", bytes, " bytes: address ", Arena::get().describe(a, bytes),
           " is no multiple of ", align);
  Buffer* b = Arena::get().find(a, bytes);
  if (uint64_t moved = b ? 0 : translate(a, bytes)) b = Arena::get().find(a = moved, bytes);
  if (!b)
    w.fail(in, lane, "out-of-bounds global ", verb(kind), " of ", bytes, " bytes at ", Arena::get().describe(a, bytes));
  if (kind != Kind::Read && !b->writable)
    w.fail(in, lane, "global ", verb(kind), " to buffer '", b->name, "', which this launch may only read (byte offset ",
           a - b->begin, ")");
  return {(uint8_t*)a, b->validAt(a), nullptr, 0, b};
}

Place locateShared(Warp& w, const Inst& in, int lane, uint32_t a, uint32_t bytes, Kind kind, uint32_t align, bool own) {
  uint32_t rank = a >> 24, off = a & 0xffffffu;
  if (off % align)
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
  return placeIn(c, off);
}

Place locate(Warp& w, const Inst& in, int lane, Space space, uint64_t a, uint32_t bytes, Kind kind, uint32_t align) {
  if (space == Space::Shared) return locateShared(w, in, lane, (uint32_t)a, bytes, kind, align, in.x[4] == 0);
  if (space == Space::Generic || space == Space::Param) {
    if (inShared(a)) return locateShared(w, in, lane, (uint32_t)a, bytes, kind, align, false);
    if (inLocal(a)) space = Space::Local, a = (uint32_t)a;
  }
  if (space == Space::Local) {
    if (a % align) w.fail(in, lane, "misaligned local ", verb(kind), " at offset ", hex(a));
    if (a < 16 || a + bytes > w.kernel->localBytes)
      w.fail(in, lane, "out-of-bounds local ", verb(kind), " at offset ", hex(a), " of ", w.kernel->localBytes,
             " bytes");
    const size_t at = (size_t)lane * w.kernel->localBytes + a;
    return {w.local + at, w.localValid + at};
  }
  return locateGlobal(w, in, lane, a, bytes, kind, align);
}

size_t takeHints(Dec& d) {
  if (d.out.x[0] && d.out.x[0] < 5 && !d.out.x[1]) d.fail("a scope is missing");
  return d.out.x[2];
}

static void countBanks(Warp& w, uint32_t m, const uint64_t* a, uint32_t bytes) {
  // A warp's access is served in groups of lanes that together move 128 bytes.
  const unsigned group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (unsigned g = 0; g < kLanes; g += group) {
    std::set<uint32_t> words;
    unsigned wanted[32] = {}, most = 0;  // words of each bank
    for (int i : lanesOf(m & kAll >> (kLanes - group) << g))
      for (uint32_t word = (uint32_t)a[i] / 4; word * 4 < (uint32_t)a[i] + bytes; ++word)
        if (words.insert(word).second) most = std::max(most, ++wanted[word % 32]);
    w.launch->n.sharedWavefronts += most;
    w.launch->n.sharedIdeal += most > 0;
  }
}

Span::Span(Warp& w, const Inst& in, uint32_t m, uint32_t size, Kind kind) : bytes(size) {
  Launch& l = *w.launch;
  auto add = [&, offset = (uint64_t)in.imm](const auto* base) {
    for (unsigned i = 0; i < kLanes; ++i) a[i] = base[i] + offset;
  };
  in.x[5] == 4 ? add(w.ptr<uint32_t>(in.a)) : add(w.ptr<uint64_t>(in.a));
  if (m & ~w.validOf(in.a)) w.needValid(in, in.a, m, "address");
  Space space = in.space;
  if (space == Space::Generic) {  // one window for all lanes is the rule
    bool other = false;
    for (int i : lanesOf(m)) other |= inShared(a[i]) || inLocal(a[i]);
    if (!other) space = Space::Global;
  }
  const bool own = space == Space::Shared && in.x[4] == 0, reads = kind == Kind::Read;
  Cta& c = *w.cta;
  Buffer* b = space == Space::Global ? Arena::get().find(a[firstLane(m)], bytes) : nullptr;
  if (b && ((!reads && !b->writable) || b->valid)) b = nullptr;
  for (int i : lanesOf(m)) {
    const uint32_t off = (uint32_t)a[i] & 0xffffffu, rank = (uint32_t)a[i] >> 24;
    Place at;
    if (own && (rank == c.rank || rank == 0) && off >= kSharedReserved && off + bytes <= c.smemBytes &&
        !(off & (bytes - 1)))
      at.p = c.smem + off, at.valid = c.smemValid + off;
    else if (b && a[i] >= b->begin && a[i] + bytes <= b->end && !(a[i] & (bytes - 1)))
      at.p = (uint8_t*)a[i];
    else
      at = locate(w, in, i, space, a[i], bytes, kind, bytes);
    if (own && !reads && (c.hasMbar[off >> 3] || c.hasMbar[(off + bytes - 1) >> 3]))
      w.fail(in, i, "ordinary ", verb(kind), " to a live mbarrier at shared offset ", hex(off));
    p[i] = at.p;
    v[i] = at.valid;
    tracked |= at.valid != nullptr;
  }
  const uint64_t total = (uint64_t)bytes * (unsigned)__builtin_popcount(m);
  if (own)
    (reads ? l.n.sharedRead : l.n.sharedWrite) += total;
  else if (space == Space::Global || space == Space::Generic)
    (reads ? l.n.globalRead : space == Space::Global && kind == Kind::Atomic ? l.n.atomics : l.n.globalWrite) += total;
  if (own && l.opt.verbose) countBanks(w, m, a, bytes);
  if (l.race && kind != Kind::Write) raceAccess(w, in, m, a, bytes, kind);
}
void Span::written(Warp& w, const Inst& in, uint32_t m, uint32_t changed) const {
  if (w.launch->race) {
    raceAccess(w, in, m & changed, a, bytes, Kind::Write);
    raceAccess(w, in, m & ~changed, a, bytes, Kind::Rewrite);
  }
  w.launch->progress();
}

namespace {

const Ref* registersOf(const Inst& in) { return in.vec == 1 ? &in.d : in.ext->refs.data(); }

template <class M, class R>
void load(Warp& w, const Inst& in, uint32_t m) {
  Span s(w, in, m, in.vec * (uint32_t)sizeof(M), Kind::Read);
  const Ref* refs = registersOf(in);
  for (unsigned k = 0; k < in.vec; ++k) {
    R* d = w.ptr<R>(refs[k]);
    uint32_t bad = 0;
    for (int i : lanesOf(m)) {
      M v;
      memcpy(&v, s.p[i] + k * sizeof(M), sizeof(M));
      d[i] = (R)v;
      if (s.tracked && !allValid(s.valid(i, k * sizeof(M)), sizeof(M))) bad |= 1u << i;
    }
    w.setValid(refs[k], m, ~bad);
  }
}

template <class M, class R>
void store(Warp& w, const Inst& in, uint32_t m) {
  Span s(w, in, m, in.vec * (uint32_t)sizeof(M), Kind::Write);
  uint32_t changed = 0;
  const Ref* refs = registersOf(in);
  for (unsigned k = 0; k < in.vec; ++k) {
    const R* d = w.ptr<const R>(refs[k]);
    const uint32_t valid = w.validOf(refs[k]), undefined = w.launch->opt.detect ? ~valid : 0;
    for (int i : lanesOf(m)) {
      if (undefined >> i & 1 && (!s.tracked || !s.v[i] || in.space == Space::Global))
        w.fail(in, i, "an uninitialised value is stored to global memory");
      const M v = (M)d[i];
      if (memcmp(s.p[i] + k * sizeof(M), &v, sizeof(M))) {
        changed |= 1u << i;
        memcpy(s.p[i] + k * sizeof(M), &v, sizeof(M));
      }
      if (s.tracked) markValid(s.valid(i, k * sizeof(M)), sizeof(M), (valid >> i) & 1);
    }
  }
  s.written(w, in, m, changed);
}

// ld.param of an entry parameter at a constant address: the same for every lane, checked when decoded.
template <class M, class R>
void loadParam(Warp& w, const Inst& in, uint32_t m) {
  for (unsigned k = 0; k < in.vec; ++k) {
    M v;
    memcpy(&v, (const uint8_t*)in.imm + k * sizeof(M), sizeof(M));
    const Ref d = registersOf(in)[k];
    setLanes<R>(w, d, m, kAll, [&](int) { return (R)v; });
  }
}

// f(M, R) by the type in memory and the bytes of the register.
template <class F>
Handler byTypes(Type t, unsigned reg, F f) {
  auto with = [&](auto m) -> Handler {
    return reg == 2 ? f(m, uint16_t()) : reg == 4 ? f(m, uint32_t()) : f(m, uint64_t());
  };
  switch (typeBytes(t)) {
    case 1: return isSigned(t) ? with(int8_t()) : with(uint8_t());
    case 2: return isSigned(t) ? with(int16_t()) : with(uint16_t());
    case 4: return isSigned(t) ? with(int32_t()) : with(uint32_t());
    case 8: return with(uint64_t());
    default: return f(B128(), B128());
  }
}

template <bool isLoad>
void loadStore(Dec& d) {
  const size_t hints = takeHints(d);
  const Type t = d.out.type;
  const unsigned bytes = d.out.bytes;
  if (t > Type::BF16x2 && t != Type::F32 && t != Type::F64) d.fail("this type is not supported");
  d.wantArgs(2 + hints);
  const Operand& mem = d.arg(isLoad);
  if (mem.kind != Operand::Address) d.fail("an address in brackets is expected");
  std::vector<Ref> refs;
  unsigned width = 0;  // of the registers
  for (const Operand& o : d.elements(d.arg(!isLoad), d.out.vec)) {
    unsigned b = d.regBytes(o);
    refs.push_back(isLoad ? d.dst(o, b ? b : bytes) : d.srcWide(o, t, &b));
    if (o.kind == Operand::Sink) continue;
    if (b < bytes) d.fail("the register is narrower than the access");
    if (width && width != b) d.fail("registers of one vector have different widths");
    width = b;
  }
  if (width == 0) width = std::max(2u, bytes);  // all sinks
  if (d.out.vec == 1)
    d.out.d = refs[0];
  else
    d.extra()->refs = refs;
  d.out.storesD = !isLoad;
  const Operand& base = mem.sub[0];
  if (isLoad && d.out.space == Space::Param && base.kind == Operand::Symbol && d.kb.params.count(base.var)) {
    if (base.i < 0 || (uint64_t)base.i + bytes * d.out.vec > base.var->bytes)
      d.fail("reads past the end of parameter ", base.var->name);
    d.out.imm = (int64_t)d.kb.k.params + d.kb.params[base.var] + base.i;
    if (d.out.imm % (bytes * d.out.vec)) d.fail("misaligned parameter access");
    d.out.fn = byTypes(t, width, [](auto m, auto r) -> Handler { return loadParam<decltype(m), decltype(r)>; });
    return;
  }
  if (!isLoad && d.out.space == Space::Const) d.fail("constant memory cannot be written");
  d.setAddress(mem);
  if (d.out.space == Space::Const) d.out.space = Space::Global;
  d.out.fn = isLoad ? byTypes(t, width, [](auto m, auto r) -> Handler { return load<decltype(m), decltype(r)>; })
                    : byTypes(t, width, [](auto m, auto r) -> Handler { return store<decltype(m), decltype(r)>; });
}

// The shared address `a` in the CTA of rank b. x[0]: 1 shared::cluster 32/64 bits, 0 generic
void mapa(Warp& w, const Inst& in, uint32_t m) {
  const auto& ctas = w.cta->cluster->ctas;
  for (int i : lanesOf(m)) {
    const uint64_t a = laneBits(w, in.a, in.bytes, i), rank = lane32(w, in.b, (unsigned)i);
    if (rank >= ctas.size()) w.fail(in, i, "mapa to CTA rank ", rank, " of a cluster of ", ctas.size());
    if (!in.x[0] && !inShared(a)) w.fail(in, i, "mapa of a generic address that is not in shared memory");
    setLaneBits(w, in.d, in.bytes, i, (a & ~0xff000000ull) | rank << 24);
  }
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b));
}
TYPED(uint32_t, CtaRank, (T a)) { return (uint32_t)a >> 24; }

void createPolicy(Warp& w, const Inst& in, uint32_t m) {
  setLanes<uint64_t>(w, in.d, m, kAll, [](int) { return 1ull << 60; });
}
void ignore(Dec& d) {
  d.used.assign(d.used.size(), true);
  d.out.fn = nothing;
}

const Forms kForms = {
    {"ld|ldu", "(weak) " MEMORY_ORDER " (nc) (unified) vector type", nullptr, loadStore<true>},
    {"st", "(weak) " MEMORY_ORDER " vector type", nullptr, loadStore<false>},
    {"prefetch|prefetchu|applypriority|pmevent", ignore},
    {"createpolicy",
     [](Dec& d) {
       ignore(d);
       d.out.d = d.dst(0, 8);
       d.out.fn = createPolicy;
     }},
    {"mapa", "shared::cluster? type", "d a b:u32", mapa},
    {"getctarank", "(shared::cluster) type", "d:u32 a", byWidth<CtaRank>},
};

}  // namespace
}  // namespace ptxsim
