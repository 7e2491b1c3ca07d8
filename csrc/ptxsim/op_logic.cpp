// Logic, shifts, comparison, selection and data movement between registers (PTX ISA 9.7.6 to 9.7.9 without memory).
#include "ops.h"

namespace ptxsim {
namespace {

TYPED(T, And, (T a, T b)) { return a & b; }
TYPED(T, Or, (T a, T b)) { return a | b; }
TYPED(T, Xor, (T a, T b)) { return a ^ b; }
TYPED(T, Not, (T a)) { return (T)~a; }
TYPED(T, Same, (T a)) { return a; }
TYPED(T, Cnot, (T a)) { return (T)(a == 0); }
TYPED(T, Shl, (T a, uint32_t n)) { return (T)(n >= 8 * sizeof(T) ? 0 : a << n); }
TYPED(T, Shr, (T a, uint32_t n)) { return (T)(a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1) >> (n >= 8 * sizeof(T))); }

// Predicate logic is that of whole lane masks.
template <class F>
void onMasks(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r;
  if constexpr (std::is_invocable<F, uint32_t, uint32_t>::value)
    r = F()(w.predicate(in.a), w.predicate(in.b));
  else
    r = F()(w.predicate(in.a));
  w.setPred(in.d, m, r, w.validOf(in.a) & w.validOf(in.b));
}
template <template <class> class F>
void logic(Dec& d) {
  if (d.types[0] == Type::Pred)
    d.out.fn = onMasks<F<uint32_t>>;
  else
    byWidth<F>(d);
}

uint32_t distance(const Inst& in, uint32_t n) { return in.x[0] ? n & 31 : std::min(n, 32u); }  // wrap or clamp
LANE(uint32_t, ShfL, (const Inst& in, uint32_t lo, uint32_t hi, uint32_t n)) {
  return (uint32_t)((((uint64_t)hi << 32 | lo) << distance(in, n)) >> 32);
}
LANE(uint32_t, ShfR, (const Inst& in, uint32_t lo, uint32_t hi, uint32_t n)) {
  return (uint32_t)(((uint64_t)hi << 32 | lo) >> distance(in, n));
}
LANE(uint32_t, Prmt, (const Inst& in, uint32_t a, uint32_t b, uint32_t c)) {
  const int s = (int)(c & 3);
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    int from = (int)(c >> (4 * i)) & 15;
    if (in.x[0]) {  // f4e, b4e, rc8, ecl, ecr, rc16
      const int byMode[] = {(s + i) & 7, (s - i) & 7, s, std::max(s, i), std::min(s, i), (s & 1) * 2 + (i & 1)};
      from = byMode[in.x[0] - 1];
    }
    uint32_t byte = (uint32_t)(((uint64_t)b << 32 | a) >> (8 * (from & 7))) & 0xff;
    if (from & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
void decodePrmt(Dec& d) {
  if (d.unknown(2)) d.out.b = d.constant(0, 4);
  d.out.fn = lanes<Prmt>();
}
LANE(uint32_t, Lop3, (const Inst& in, uint32_t a, uint32_t b, uint32_t c)) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (in.imm >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
void lop3Bool(Warp& w, const Inst& in, uint32_t m) {  // d|p = lop3 ..., q: p = (d != 0) BoolOp q
  const Ref q = in.ext->refs[1];
  lanes<Lop3>()(w, in, m);
  uint32_t p = 0;
  for (unsigned i = 0; i < kLanes; ++i) p |= (uint32_t)(lane32(w, in.d, i) != 0) << i;
  p = in.x[0] ? p & w.predicate(q) : p | w.predicate(q);
  w.setPred(in.ext->refs[0], m, p, w.validOf(in.d) & w.validOf(q));
}

// ---- comparison

// What a comparison accepts. The forms with u hold when one value is NaN; ne does not, as float comparison has it.
#define COMPARISON "eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? "
enum { Lt = 1, Eq = 2, Gt = 4, Un = 8, Any = 15 };  // less, equal, greater, unordered
constexpr uint8_t kAccepted[] = {Eq,      Lt | Gt, Lt,       Lt | Eq, Gt,       Gt | Eq, Lt,       Lt | Eq,  Gt,
                                 Gt | Eq, Eq | Un, Any - Eq, Lt | Un, Any - Gt, Gt | Un, Any - Lt, Any - Un, Un};
template <class T, float (*Value)(T)>
struct As {
  T v;
  operator float() const { return Value(v); }
};
using AsF16 = As<uint16_t, fromF16>;
using AsBf16 = As<uint16_t, fromBf16>;
template <class Part, int I>
struct PartOf {
  Part part[2];
  operator float() const { return part[I]; }
};

using CompareFn = uint32_t (*)(Warp&, const Inst&);
template <class T, class V = float>
uint32_t compareLanes(Warp& w, const Inst& in) {  // x[0]: accepted
  const T *a = w.ptr<const T>(in.a), *b = w.ptr<const T>(in.b);
  auto where = [&](auto test) {
    uint32_t r = 0;
    for (unsigned i = 0; i < kLanes; ++i) r |= (uint32_t)test((V)a[i], (V)b[i]) << i;
    return r;
  };
  const bool most = __builtin_popcount(in.x[0]) > 2;
  const unsigned look = most ? Any - in.x[0] : in.x[0];
  uint32_t r = 0;
  if (look & Lt) r |= where([](V x, V y) { return x < y; });
  if (look & Eq) r |= where([](V x, V y) { return x == y; });
  if (look & Gt) r |= where([](V x, V y) { return x > y; });
  if (look & Un) r |= where([](V x, V y) { return x != x || y != y; });
  return most ? ~r : r;
}
void takeComparison(Dec& d, Type t) {
  if ((d.out.x[1] != 0) != (d.argc() == 4)) d.fail("a third source goes with a boolean operator");
  d.out.x[0] = kAccepted[d.out.x[0]];
  if (!isFloat(t) && __builtin_popcount(d.out.x[0]) == 2) d.out.x[0] |= Un;  // never so: one look does
}
int64_t compareFn(Dec& d, Type t) {
  CompareFn fn = ofType<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, float, double>(
      t, [](auto v) -> CompareFn { return compareLanes<decltype(v), decltype(v)>; });
  if (t == Type::F32 && d.out.x[2]) fn = compareLanes<As<float, flush>>;
  if (t == Type::F16) fn = compareLanes<AsF16>;
  if (t == Type::BF16) fn = compareLanes<AsBf16>;
  if (!fn) d.fail("this type cannot be compared");
  return (int64_t)fn;
}
// x[1]: no boolean operator, and, or, xor
uint32_t combine(const Inst& in, uint32_t t, uint32_t c) {
  return in.x[1] == 1 ? t & c : in.x[1] == 2 ? t | c : in.x[1] == 3 ? t ^ c : t;
}

void setp(Warp& w, const Inst& in, uint32_t m) {
  const uint32_t t = ((CompareFn)in.imm)(w, in), c = w.predicate(in.c);
  const uint32_t v = w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c);
  w.setPred(in.d, m, combine(in, t, c), v);
  if (in.ext->refs[0].id) w.setPred(in.ext->refs[0], m, combine(in, ~t, c), v);
}
template <class H>
void setpHalves(Warp& w, const Inst& in, uint32_t m) {  // p|q = the two halves
  const uint32_t v = w.validOf(in.a) & w.validOf(in.b), high = compareLanes<PartOf<H, 1>>(w, in);
  w.setPred(in.d, m, compareLanes<PartOf<H, 0>>(w, in), v);
  w.setPred(in.ext->refs[0], m, high, v);
}
void decodeSetp(Dec& d) {
  const Type t = d.types[0];
  takeComparison(d, t);
  if (t != Type::F16x2 && t != Type::BF16x2) {
    d.out.imm = compareFn(d, t);
    d.out.fn = setp;
    return;
  }
  if (d.out.x[1] || !d.extra()->refs[0].id)
    d.fail("only the p|q form without a boolean operator is supported for packed halves");
  d.out.fn = t == Type::F16x2 ? setpHalves<AsF16> : setpHalves<AsBf16>;
}

// set: d = comparison ? 1.0 or all ones : 0
template <class T>
void setValue(Warp& w, const Inst& in, uint32_t m) {
  const uint32_t t = combine(in, ((CompareFn)in.imm)(w, in), w.predicate(in.c));
  T r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (t >> i) & 1 ? (T)in.ext->v[0] : 0;
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}
void decodeSet(Dec& d) {
  const Type t = d.types[0];
  d.extra()->v[0] = t == Type::F32 ? 0x3f800000 : t == Type::F16 ? 0x3c00 : t == Type::BF16 ? 0x3f80 : kAll;
  takeComparison(d, d.types[1]);
  d.out.imm = compareFn(d, d.types[1]);
  d.out.fn = typeBytes(t) == 2 ? setValue<uint16_t> : setValue<uint32_t>;
}

// ---- selection and moves

template <class T>
void selp(Warp& w, const Inst& in, uint32_t m) {
  const T *a = w.ptr<const T>(in.a), *b = w.ptr<const T>(in.b);
  const uint32_t p = w.predicate(in.c);
  T r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (p >> i) & 1 ? a[i] : b[i];
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, ((w.validOf(in.a) & p) | (w.validOf(in.b) & ~p)) & w.validOf(in.c));
}
void decodeSelp(Dec& d) {
  d.out.fn = ofWidth(typeBytes(d.types[0]), [](auto t) -> Handler { return selp<decltype(t)>; });
}
TYPED(T, SlctS32, (T a, T b, int32_t c)) { return c >= 0 ? a : b; }
TYPED(T, SlctF32, (T a, T b, float c)) { return c >= 0 ? a : b; }

template <class T>
void mov(Warp& w, const Inst& in, uint32_t m) {
  storeLanes(w, in.d, w.ptr<T>(in.a), m);
  w.setValid(in.d, m, w.validOf(in.a));
}
void movSpecial(Warp& w, const Inst& in, uint32_t m) {  // one that changes while the warp runs
  for (int i : lanesOf(m)) setLaneBits(w, in.d, in.bytes, i, ((const Special*)in.imm)->value(w, (unsigned)i, 0));
  w.setValid(in.d, m, kAll);
}

// mov.b32 d, {a, b} and back: parts of type T, of a whole of `bytes`, in registers ext->refs of ext->widths bytes, 0
// for a sink.
template <class T>
void pack(Warp& w, const Inst& in, uint32_t m) {
  uint32_t valid = kAll;
  for (size_t k = 0; k < in.ext->refs.size(); ++k) {
    const Ref part = in.ext->refs[k];
    uint8_t *to = w.ptr<uint8_t>(in.d) + k * sizeof(T), *from = w.ptr<uint8_t>(part);
    for (int i : lanesOf(m)) memcpy(to + in.bytes * i, from + in.ext->widths[k] * (unsigned)i, sizeof(T));
    valid &= w.validOf(part);
  }
  w.setValid(in.d, m, valid);
}
template <class T>
void unpack(Warp& w, const Inst& in, uint32_t m) {
  for (size_t k = 0; k < in.ext->refs.size(); ++k) {
    if (!in.ext->widths[k]) continue;
    for (int i : lanesOf(m)) {
      T part;
      memcpy(&part, w.ptr<uint8_t>(in.a) + in.bytes * i + k * sizeof(T), sizeof(T));
      setLaneBits(w, in.ext->refs[k], in.ext->widths[k], i, part);
    }
    w.setValid(in.ext->refs[k], m, w.validOf(in.a));
  }
}

void decodeMov(Dec& d) {
  const Type t = d.types[0];
  const unsigned bytes = typeBytes(t);
  const Operand &to = d.arg(0), &from = d.arg(1);
  d.wantArgs(2);
  d.out.bytes = (uint8_t)bytes;
  if (from.kind == Operand::Vector || to.kind == Operand::Vector) {
    const bool packs = from.kind == Operand::Vector;
    const std::vector<Operand>& parts = packs ? from.sub : to.sub;
    const unsigned each = bytes / (unsigned)parts.size(), reg = std::max(2u, each);
    const Type part = each == 1 ? Type::B8 : each == 2 ? Type::B16 : each == 4 ? Type::B32 : Type::B64;
    if (packs)
      d.out.d = d.dst(to, bytes);
    else
      d.out.a = d.src(from, t);
    for (auto& o : parts) {
      unsigned width = o.kind == Operand::Sink ? 0 : reg;
      d.extra()->refs.push_back(packs ? d.srcWide(o, part, &width) : d.dst(o, reg));
      d.extra()->widths.push_back(width);
    }
    auto handler = [&](auto t) -> Handler { return packs ? pack<decltype(t)> : unpack<decltype(t)>; };
    d.out.fn = each == 1 ? handler(uint8_t()) : ofWidth(each, handler);
    return;
  }
  d.out.d = d.dst(to, bytes);
  if (from.kind == Operand::Special && from.special->changes) {
    d.out.imm = (int64_t)from.special;
    d.out.fn = movSpecial;
    return;
  }
  d.out.a = d.src(from, t);
  d.out.fn = bytes == 16 ? mov<B128> : ofWidth(bytes, [](auto v) -> Handler { return mov<decltype(v)>; });
}

// ---- address spaces
LANE(uint64_t, ToShared, (uint64_t a)) { return a + kSharedWindow; }
LANE(uint64_t, ToLocal, (uint64_t a)) { return a + kLocalWindow; }
LANE(uint64_t, Offset, (uint64_t a)) { return (uint32_t)a; }
LANE(uint64_t, ToParam, (const Warp& w, const Inst&, uint64_t a)) {
  return a < w.kernel->paramBytes ? a + (uint64_t)w.kernel->params : a;
}
LANE(bool, IsSpace, (const Warp& w, const Inst& in, uint64_t a)) {
  switch (in.x[0]) {
    case 0: return !inShared(a) && !inLocal(a) && (a >> 32) != 0;
    case 1:
    case 2: return inShared(a) && ((uint32_t)a >> 24) == w.cta->rank;
    case 3: return inShared(a);
    case 4: return inLocal(a);
    default: return false;  // const, param
  }
}

const Forms kForms = {
    {"and", "type", "d a b", logic<And>},
    {"or", "type", "d a b", logic<Or>},
    {"xor", "type", "d a b", logic<Xor>},
    {"not", "type", "d a", logic<Not>},
    {"cnot", "type", "d a", byWidth<Cnot>},
    {"lop3", "or|and type", "d|p a b c imm e:pred", lop3Bool},
    {"lop3", "type", "d a b c imm", lanes<Lop3>()},
    {"shl", "type", "d a b:u32", byWidth<Shl>},
    {"shr", "bits", "d a b:u32", byType<Shr>},
    {"shf", "l clamp|wrap type", "d a b c:u32", lanes<ShfL>()},
    {"shf", "r clamp|wrap type", "d a b c:u32", lanes<ShfR>()},
    {"prmt", "f4e|b4e|rc8|ecl|ecr|rc16? type", "d a b c", decodePrmt},
    {"setp", COMPARISON "type", "d:pred|p a b c:pred?", decodeSetp},
    {"set", COMPARISON "type type", "d a:1 b:1 c:pred?", decodeSet},
    {"selp", "type", "d a b c:pred", decodeSelp},
    {"slct", "(ftz) type s32", "d a b c:1", byWidth<SlctS32>},
    {"slct", "(ftz) type f32", "d a b c:1", byWidth<SlctF32>},
    {"mov", "pred", "d a", onMasks<Same<uint32_t>>},
    {"mov", "type", nullptr, decodeMov},
    {"cvta", "to shared|shared::cta|shared::cluster|local u64", "d a", lanes<Offset>()},
    {"cvta", "to global|const|param|param::entry u64", "d a", lanes<Same<uint64_t>>()},
    {"cvta", "shared|shared::cta|shared::cluster u64", "d a", lanes<ToShared>()},
    {"cvta", "local u64", "d a", lanes<ToLocal>()},
    {"cvta", "param|param::entry u64", "d a", lanes<ToParam>()},
    {"cvta", "global|const u64", "d a", lanes<Same<uint64_t>>()},
    {"isspacep", "global|shared|shared::cta|shared::cluster|local|const|param", "d:pred a:u64", lanes<IsSpace>()},
};

}  // namespace
}  // namespace ptxsim
