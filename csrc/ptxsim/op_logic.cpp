// Logic, shifts, comparison, selection and data movement between registers (PTX ISA 9.7.6 to 9.7.9 without memory).
#include <algorithm>
#include <array>

#include "half.h"
#include "ops.h"

namespace ptxsim {
namespace {

TYPED(T, And, (T a, T b)) { return (a & b); }
TYPED(T, Or, (T a, T b)) { return a | b; }
TYPED(T, Xor, (T a, T b)) { return a ^ b; }
TYPED(T, Not, (T a)) { return (T)~a; }
TYPED(T, Cnot, (T a)) { return (T)(a == 0); }
TYPED(T, Shl, (T a, uint32_t n)) { return (T)(n >= 8 * sizeof(T) ? 0 : a << n); }
TYPED(T, Shr, (T a, uint32_t n)) { return (T)(a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1) >> (n >= 8 * sizeof(T))); }

struct ShfL {
  uint32_t operator()(const Inst& in, uint32_t lo, uint32_t hi, uint32_t n) const {
    n = in.x[0] ? n & 31 : std::min(n, 32u);
    return (uint32_t)((((uint64_t)hi << 32 | lo) << n) >> 32);
  }
};
struct ShfR {
  uint32_t operator()(const Inst& in, uint32_t lo, uint32_t hi, uint32_t n) const {
    n = in.x[0] ? n & 31 : std::min(n, 32u);
    return (uint32_t)(((uint64_t)hi << 32 | lo) >> n);
  }
};
struct Prmt {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b, uint32_t c) const {
    uint64_t v = (uint64_t)b << 32 | a;
    uint32_t sel[4];
    const int s = (int)(c & 3);
    for (int i = 0; i < 4; ++i) switch (in.x[0]) {
        case 0: sel[i] = (c >> (4 * i)) & 15; break;
        case 1: sel[i] = (uint32_t)((s + i) & 7); break;             // f4e
        case 2: sel[i] = (uint32_t)((s - i) & 7); break;             // b4e
        case 3: sel[i] = (uint32_t)s; break;                         // rc8
        case 4: sel[i] = (uint32_t)std::max(s, i); break;            // ecl
        case 5: sel[i] = (uint32_t)std::min(s, i); break;            // ecr
        default: sel[i] = (uint32_t)((s & 1) * 2 + (i & 1)); break;  // rc16
      }
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      uint32_t byte = (uint32_t)(v >> (8 * (sel[i] & 7))) & 0xff;
      if (in.x[0] == 0 && sel[i] & 8) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};
struct Lop3 {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b, uint32_t c) const {
    uint32_t r = 0;
    for (int i = 0; i < 8; ++i)
      if (in.imm >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
  }
};
void lop3Bool(Warp& w, const Inst& in, uint32_t m) {  // d|p = lop3 ..., q: p = (d != 0) BoolOp q
  uint32_t r[kLanes], p = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    r[i] = Lop3()(in, lane32(w, in.a, i), lane32(w, in.b, i), lane32(w, in.c, i));
    p |= (uint32_t)(r[i] != 0) << i;
  }
  uint32_t q = w.pred(in.ext->refs[1]) ^ (in.x[1] ? kAll : 0);
  p = in.x[0] ? p & q : p | q;
  uint32_t v = w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, v);
  w.setPred(in.ext->refs[0], m, p, v & w.validOf(in.ext->refs[1]));
}

// Predicate logic on whole lane masks. x[0], x[1]: the sources are negated.
template <int Op>
void predLogic(Warp& w, const Inst& in, uint32_t m) {
  uint32_t a = w.pred(in.a) ^ (in.x[0] ? kAll : 0), b = Op < 3 ? w.pred(in.b) ^ (in.x[1] ? kAll : 0) : 0;
  uint32_t r = Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : Op == 3 ? ~a : a;
  w.setPred(in.d, m, r, w.validOf(in.a) & (Op < 3 ? w.validOf(in.b) : kAll));
}

template <template <class> class F, int PredOp>
void logicOp(Dec& d) {
  Type t = d.needType();
  d.wantArgs(3, 3);
  if (t == Type::Pred) {
    bool na, nb;
    d.out.d = d.predDst(d.arg(0));
    d.out.a = d.pred(d.arg(1), &na);
    d.out.b = d.pred(d.arg(2), &nb);
    d.out.x[0] = na;
    d.out.x[1] = nb;
    d.out.fn = predLogic<PredOp>;
    return;
  }
  setOperands(d, t, t, t);
  d.out.fn = BY_WIDTH(t, F);
}

void shift(Dec& d, bool left) {
  Type t = d.needType();
  setOperands(d, t, t, Type::U32);
  d.out.fn = left ? BY_WIDTH(t, Shl) : isSigned(t) ? BY_TYPE(t, Shr) : BY_WIDTH(t, Shr);
}

// ---- comparison

// A comparison C of two values. The forms with u hold when one is NaN; Ne does not, as float comparison has it.
enum Cmp { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
template <int C, class T>
inline bool compare(T a, T b) {
  if constexpr (C == Eq) return a == b;
  if constexpr (C == Ne) return a < b || a > b;
  if constexpr (C == Lt) return a < b;
  if constexpr (C == Le) return a <= b;
  if constexpr (C == Gt) return a > b;
  if constexpr (C == Ge) return a >= b;
  if constexpr (C == Equ) return !(a < b || a > b);
  if constexpr (C == Neu) return a != b;
  if constexpr (C == Ltu) return !(a >= b);
  if constexpr (C == Leu) return !(a > b);
  if constexpr (C == Gtu) return !(a <= b);
  if constexpr (C == Geu) return !(a < b);
  if constexpr (C == Num) return a == a && b == b;
  if constexpr (C == Nan) return a != a || b != b;
}
struct AsF16 {
  uint16_t h;
  operator float() const { return fromF16(h); }
};
struct AsBf16 {
  uint16_t h;
  operator float() const { return fromBf16(h); }
};
struct AsF32Ftz {
  uint32_t u;
  operator float() const { return flush(f32(u)); }
};

// Half: 0 or 1, of a register that holds two values.
template <int C, class T, class V, int Half>
uint32_t compareLanes(Warp& w, const Inst& in) {
  constexpr unsigned step = Half < 0 ? 1 : 2, first = Half < 0 ? 0 : Half;
  const T *a = w.ptr<const T>(in.a) + first, *b = w.ptr<const T>(in.b) + first;
  uint32_t r = 0;
  for (unsigned i = 0; i < kLanes; ++i) r |= (uint32_t)compare<C, V>((V)a[step * i], (V)b[step * i]) << i;
  return r;
}
using CompareFn = uint32_t (*)(Warp&, const Inst&);
template <class T, class V, int Half, int... C>
CompareFn pickCompare(int c, std::integer_sequence<int, C...>) {
  static const CompareFn table[] = {compareLanes<C, T, V, Half>...};
  return table[c];
}
template <class T, class V, int Half = -1>
CompareFn pickCompare(int c) {
  return pickCompare<T, V, Half>(c, std::make_integer_sequence<int, Nan + 1>());
}
CompareFn pickCompare(Type t, int c, bool ftz) {
  switch (t) {
    case Type::B16:
    case Type::U16: return pickCompare<uint16_t, uint16_t>(c);
    case Type::S16: return pickCompare<int16_t, int16_t>(c);
    case Type::B32:
    case Type::U32: return pickCompare<uint32_t, uint32_t>(c);
    case Type::S32: return pickCompare<int32_t, int32_t>(c);
    case Type::B64:
    case Type::U64: return pickCompare<uint64_t, uint64_t>(c);
    case Type::S64: return pickCompare<int64_t, int64_t>(c);
    case Type::F32: return ftz ? pickCompare<AsF32Ftz, float>(c) : pickCompare<float, float>(c);
    case Type::F64: return pickCompare<double, double>(c);
    case Type::F16: return pickCompare<AsF16, float>(c);
    case Type::BF16: return pickCompare<AsBf16, float>(c);
    default: return nullptr;
  }
}
int takeCompare(Dec& d) {
  static const std::pair<const char*, int> kNames[] = {
      {"eq", Eq},   {"ne", Ne},   {"lt", Lt},   {"le", Le},   {"gt", Gt},   {"ge", Ge},
      {"lo", Lt},   {"ls", Le},   {"hi", Gt},   {"hs", Ge},   {"equ", Equ}, {"neu", Neu},
      {"ltu", Ltu}, {"leu", Leu}, {"gtu", Gtu}, {"geu", Geu}, {"num", Num}, {"nan", Nan}};
  int c = -1;
  for (auto& n : kNames)
    if (c < 0 && d.take(n.first)) c = n.second;
  if (c < 0) d.fail("a comparison is missing");
  return c;
}

// x[0]: bool op (0 none, 1 and, 2 or, 3 xor); x[1]: c negated; ext->refs = {q, c}
void setp(Warp& w, const Inst& in, uint32_t m) {
  uint32_t t = ((CompareFn)in.imm)(w, in), p = t, q = ~t;
  uint32_t v = w.validOf(in.a) & w.validOf(in.b);
  if (in.x[0]) {
    uint32_t c = w.pred(in.ext->refs[1]) ^ (in.x[1] ? kAll : 0);
    v &= w.validOf(in.ext->refs[1]);
    p = in.x[0] == 1 ? t & c : in.x[0] == 2 ? t | c : t ^ c;
    q = in.x[0] == 1 ? ~t & c : in.x[0] == 2 ? ~t | c : ~t ^ c;
  }
  w.setPred(in.d, m, p, v);
  if (in.x[2]) {
    w.setPred(in.ext->refs[0], m, q, v);
  }
}
void setpHalf2(Warp& w, const Inst& in, uint32_t m) {  // p|q = the two halves
  const uint32_t v = w.validOf(in.a) & w.validOf(in.b);
  const uint32_t low = ((CompareFn)in.ext->v[0])(w, in), high = ((CompareFn)in.ext->v[1])(w, in);
  w.setPred(in.d, m, low, v);
  w.setPred(in.ext->refs[0], m, high, v);
}
int takeBoolOp(Dec& d) { return d.take("and") ? 1 : d.take("or") ? 2 : d.take("xor") ? 3 : 0; }

void decodeSetp(Dec& d) {
  int c = takeCompare(d);
  int boolOp = takeBoolOp(d);
  bool ftz = d.take("ftz");
  Type t = d.needType();
  d.wantArgs(boolOp ? 4 : 3, boolOp ? 4 : 3);
  const Operand& o = d.arg(0);
  Ref q{};
  if (o.kind == Operand::Pair) {
    d.out.d = d.predDst(o.sub[0]);
    q = d.predDst(o.sub[1]);
    d.out.x[2] = 1;
  } else {
    d.out.d = d.predDst(o);
  }
  d.out.a = d.src(1, t);
  d.out.b = d.src(2, t);
  bool neg = false;
  Ref third = boolOp ? d.pred(d.arg(3), &neg) : Ref{};
  d.extra()->refs = {q, third};
  d.out.x[0] = (uint8_t)boolOp;
  d.out.x[1] = neg;
  if (t == Type::F16x2 || t == Type::BF16x2) {
    if (boolOp || !d.out.x[2]) d.fail("only the p|q form without a boolean operator is supported for packed halves");
    const bool f16 = t == Type::F16x2;
    d.extra()->v[0] = (int64_t)(f16 ? pickCompare<AsF16, float, 0>(c) : pickCompare<AsBf16, float, 0>(c));
    d.extra()->v[1] = (int64_t)(f16 ? pickCompare<AsF16, float, 1>(c) : pickCompare<AsBf16, float, 1>(c));
    d.out.fn = setpHalf2;
    return;
  }
  CompareFn f = pickCompare(t, c, ftz);
  if (!f) return;
  d.out.imm = (int64_t)f;
  d.out.fn = setp;
}

// set: d = comparison ? (float ? 1.0 : all ones) : 0; x[2]: destination bytes, x[3]: float destination
void setValue(Warp& w, const Inst& in, uint32_t m) {
  uint32_t t = ((CompareFn)in.imm)(w, in), v = w.validOf(in.a) & w.validOf(in.b);
  if (in.x[0]) {
    uint32_t c = w.pred(in.c) ^ (in.x[1] ? kAll : 0);
    v &= w.validOf(in.c);
    t = in.x[0] == 1 ? t & c : in.x[0] == 2 ? t | c : t ^ c;
  }
  uint64_t r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (t >> i) & 1 ? in.ext->v[0] : 0;
  putLanes(w, in.d, in.x[2], r, m);
  w.setValid(in.d, m, v);
}

// ---- selection and moves

template <class T>
void selp(Warp& w, const Inst& in, uint32_t m) {
  const T* a = w.ptr<const T>(in.a);
  const T* b = w.ptr<const T>(in.b);
  uint32_t p = w.pred(in.c) ^ (in.x[0] ? kAll : 0);
  T r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (p >> i) & 1 ? a[i] : b[i];
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, ((w.validOf(in.a) & p) | (w.validOf(in.b) & ~p)) & w.validOf(in.c));
}
template <class T, class C>
struct Slct {
  T operator()(T a, T b, C c) const { return c >= 0 ? a : b; }
};

template <class T>
void mov(Warp& w, const Inst& in, uint32_t m) {
  storeLanes(w, in.d, w.ptr<T>(in.a), m);
  w.setValid(in.d, m, w.validOf(in.a));
}
struct B128 {
  uint64_t v[2];
};

void movClock(Warp& w, const Inst& in,
              uint32_t m) {  // x[0]: 0 clock, 1 clock64, 2 globaltimer; x[1]: bytes; x[2]: high half
  uint64_t t = w.launch->clock + w.executed;
  if (in.x[0] == 2) t = 1000000000ull + t;
  if (in.x[2]) t >>= 32;
  uint64_t r[kLanes];
  for (auto& x : r) x = t;
  putLanes(w, in.d, in.x[1], r, m);
  w.setValid(in.d, m, kAll);
}

// mov.b32 d, {a, b}: ext->refs, element bytes in ext->widths (predicates are not elements)
void pack(Warp& w, const Inst& in, uint32_t m) {
  const auto& refs = in.ext->refs;
  uint32_t v = kAll;
  for (int i : lanesOf(m)) {
    unsigned __int128 r = 0;
    for (size_t k = 0; k < refs.size(); ++k) {
      const uint64_t e = laneBits(w, refs[k], in.ext->widths[k], i);
      r |= (unsigned __int128)(in.bytes == 1 ? e & 0xff : e) << (8 * in.bytes * k);
    }
    if (in.x[0] == 16)
      memcpy(w.ptr<B128>(in.d) + i, &r, 16);
    else
      setLaneBits(w, in.d, in.x[0], i, (uint64_t)r);
  }
  for (auto& ref : refs) v &= w.validOf(ref);
  w.setValid(in.d, m, v);
}
void unpack(Warp& w, const Inst& in, uint32_t m) {
  const auto& refs = in.ext->refs;
  for (int i : lanesOf(m)) {
    unsigned __int128 r = 0;
    if (in.x[0] == 16)
      memcpy(&r, w.ptr<B128>(in.a) + i, 16);
    else
      r = laneBits(w, in.a, in.x[0], i);
    for (size_t k = 0; k < refs.size(); ++k) {
      const uint64_t e = (uint64_t)(r >> (8 * in.bytes * k));
      if (in.ext->widths[k]) setLaneBits(w, refs[k], in.ext->widths[k], i, in.bytes == 1 ? e & 0xff : e);  // no sink
    }
  }
  for (auto& ref : refs) w.setValid(ref, m, w.validOf(in.a));
}

void decodeMov(Dec& d) {
  Type t = d.needType();
  d.wantArgs(2, 2);
  const Operand &to = d.arg(0), &from = d.arg(1);
  if (t == Type::Pred) {
    bool neg;
    d.out.d = d.predDst(to);
    d.out.a = d.pred(from, &neg);
    d.out.x[0] = neg;
    d.out.fn = predLogic<4>;
    return;
  }
  unsigned bytes = typeBytes(t);
  if (from.kind == Operand::Vector) {
    d.out.d = d.dst(to, bytes);
    d.out.x[0] = (uint8_t)bytes;
    d.out.bytes = (uint8_t)(bytes / from.sub.size());
    Type et = d.out.bytes == 1 ? Type::B8 : d.out.bytes == 2 ? Type::B16 : d.out.bytes == 4 ? Type::B32 : Type::B64;
    for (auto& e : from.sub) {
      unsigned b;
      Ref r = d.srcWide(e, et, &b);
      d.extra()->refs.push_back(r);
      d.extra()->widths.push_back(b);
    }
    d.out.storesD = false;
    d.out.fn = pack;
    return;
  }
  if (to.kind == Operand::Vector) {
    unsigned b;
    d.out.a = d.srcWide(from, t, &b);
    d.out.x[0] = (uint8_t)bytes;
    d.out.bytes = (uint8_t)(bytes / to.sub.size());
    for (auto& e : to.sub) {
      d.extra()->refs.push_back(e.kind == Operand::Sink ? d.dst(e, 8) : d.dst(e, std::max(2u, (unsigned)d.out.bytes)));
      d.extra()->widths.push_back(e.kind == Operand::Sink ? 0 : std::max(2u, (unsigned)d.out.bytes));
    }
    d.out.fn = unpack;
    return;
  }
  d.out.d = d.dst(to, bytes);
  if (from.kind == Operand::Special) {
    static const std::unordered_map<std::string, std::array<uint8_t, 2>> kClocks = {
        {"%clock", {0, 0}},       {"%clock_hi", {0, 1}},       {"%clock64", {1, 0}},
        {"%globaltimer", {2, 0}}, {"%globaltimer_lo", {2, 0}}, {"%globaltimer_hi", {2, 1}}};
    if (auto it = kClocks.find(from.name); it != kClocks.end()) {
      d.out.x[0] = it->second[0];
      d.out.x[1] = (uint8_t)bytes;
      d.out.x[2] = it->second[1];
      d.out.fn = movClock;
      return;
    }
  }
  d.out.a = d.src(from, t);
  switch (bytes) {
    case 2: d.out.fn = mov<uint16_t>; break;
    case 4: d.out.fn = mov<uint32_t>; break;
    case 8: d.out.fn = mov<uint64_t>; break;
    case 16: d.out.fn = mov<B128>; break;
    default: break;
  }
}

LANE(uint64_t, Ident64, (uint64_t a)) { return a; }
LANE(uint64_t, ToShared, (uint64_t a)) { return a + kSharedWindow; }
LANE(uint64_t, ToLocal, (uint64_t a)) { return a + kLocalWindow; }
LANE(uint64_t, FromShared, (uint64_t a)) { return (uint32_t)a; }

void fromParam(Warp& w, const Inst& in, uint32_t m) {
  uint64_t r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) {
    r[i] = lane64(w, in.a, i);
    if (r[i] < w.kernel->paramBytes) r[i] += (uint64_t)w.kernel->params;
  }
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
}

void decodeCvta(Dec& d) {
  bool to = d.take("to");
  int space =
      d.takeOneOf({"global", "shared", "local", "const", "param", "shared::cta", "shared::cluster", "param::entry"});
  Type t = d.needType();
  if (t != Type::U64) d.fail("addresses have 64 bits");
  d.wantArgs(2, 2);
  d.out.d = d.dst(0, 8);
  d.out.a = d.src(1, Type::U64);
  const bool shared = space == 1 || space == 5 || space == 6, param = space == 4 || space == 7;
  if (shared)
    d.out.fn = to ? lanes<FromShared>() : lanes<ToShared>();
  else if (space == 2)
    d.out.fn = to ? lanes<FromShared>() : lanes<ToLocal>();
  else
    d.out.fn = param && !to ? (Handler)fromParam : lanes<Ident64>();
}

void isspacep(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    uint64_t a = lane64(w, in.a, i);
    bool t = false;
    switch (in.x[0]) {
      case 0: t = !inShared(a) && !inLocal(a) && (a >> 32) != 0; break;
      case 1: t = inShared(a) && ((uint32_t)a >> 24) == w.cta->rank; break;
      case 2: t = inShared(a); break;
      case 3: t = inLocal(a); break;
      default: break;
    }
    r |= (uint32_t)t << i;
  }
  w.setPred(in.d, m, r, w.validOf(in.a));
}

}  // namespace

static void addLogicOps(OpTable& t) {
  t["and"] = logicOp<And, 0>;
  t["or"] = logicOp<Or, 1>;
  t["xor"] = logicOp<Xor, 2>;
  t["not"] = [](Dec& d) {
    Type ty = d.needType();
    d.wantArgs(2, 2);
    if (ty == Type::Pred) {
      bool neg;
      d.out.d = d.predDst(d.arg(0));
      d.out.a = d.pred(d.arg(1), &neg);
      d.out.x[0] = neg;
      d.out.fn = predLogic<3>;
      return;
    }
    setOperands(d, ty, ty);
    d.out.fn = BY_WIDTH(ty, Not);
  };
  t["cnot"] = [](Dec& d) {
    Type ty = d.needType();
    setOperands(d, ty, ty);
    d.out.fn = BY_WIDTH(ty, Cnot);
  };
  t["lop3"] = [](Dec& d) {
    int boolOp = d.takeOneOf({"or", "and"});
    d.needType();
    d.wantArgs(5, 6);
    const Operand& o = d.arg(0);
    d.out.d = d.dst(o.kind == Operand::Pair ? o.sub[0] : o, 4);
    d.out.a = d.src(1, Type::B32);
    d.out.b = d.src(2, Type::B32);
    d.out.c = d.src(3, Type::B32);
    d.out.imm = d.intArg(4) & 0xff;
    if (o.kind == Operand::Pair) {
      if (boolOp < 0) d.fail("a boolean operator is missing");
      bool neg;
      d.extra()->refs = {d.predDst(o.sub[1]), d.pred(d.arg(5), &neg)};
      d.out.x[0] = (uint8_t)boolOp;
      d.out.x[1] = neg;
      d.out.fn = lop3Bool;
    } else {
      d.out.fn = lanes<Lop3>();
    }
  };
  t["shl"] = [](Dec& d) { shift(d, true); };
  t["shr"] = [](Dec& d) { shift(d, false); };
  t["shf"] = [](Dec& d) {
    bool left = d.takeOneOf({"l", "r"}) == 0;
    d.out.x[0] = d.takeOneOf({"clamp", "wrap"}) == 1;
    Type ty = d.needType();
    setOperands(d, ty, ty, ty, Type::U32);
    d.out.fn = left ? lanes<ShfL>() : lanes<ShfR>();
  };
  t["prmt"] = [](Dec& d) {
    d.needType();
    d.out.x[0] = (uint8_t)(1 + d.takeOneOf({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}));
    setOperands(d, Type::B32, Type::B32, Type::B32, Type::B32);
    if (d.unknown(2)) d.out.b = d.constant(0, 4);
    d.out.fn = lanes<Prmt>();
  };
  t["setp"] = decodeSetp;
  t["set"] = [](Dec& d) {
    int c = takeCompare(d), boolOp = takeBoolOp(d);
    bool ftz = d.take("ftz");
    Type dt = d.needType(), st = d.needType();
    d.wantArgs(boolOp ? 4 : 3, boolOp ? 4 : 3);
    d.out.d = d.dst(0, typeBytes(dt));
    d.out.a = d.src(1, st);
    d.out.b = d.src(2, st);
    if (boolOp) {
      bool neg;
      d.out.c = d.pred(d.arg(3), &neg);
      d.out.x[1] = neg;
    }
    d.out.x[0] = (uint8_t)boolOp;
    d.out.x[2] = (uint8_t)typeBytes(dt);
    d.extra()->v[0] = dt == Type::F32                      ? 0x3f800000
                      : dt == Type::F16                    ? 0x3c00
                      : dt == Type::BF16                   ? 0x3f80
                      : dt == Type::U16 || dt == Type::S16 ? 0xffff
                                                           : 0xffffffff;
    CompareFn f = pickCompare(st, c, ftz);
    if (!f) return;
    d.out.imm = (int64_t)f;
    d.out.fn = setValue;
  };
  t["selp"] = [](Dec& d) {
    Type ty = d.needType();
    d.wantArgs(4, 4);
    bool neg;
    d.out.d = d.dst(0, typeBytes(ty));
    d.out.a = d.src(1, ty);
    d.out.b = d.src(2, ty);
    d.out.c = d.pred(d.arg(3), &neg);
    d.out.x[0] = neg;
    d.out.fn = typeBytes(ty) == 2   ? (Handler)selp<uint16_t>
               : typeBytes(ty) == 4 ? (Handler)selp<uint32_t>
                                    : (Handler)selp<uint64_t>;
  };
  t["slct"] = [](Dec& d) {
    d.take("ftz");
    Type ty = d.needType(), ct = d.needType();
    setOperands(d, ty, ty, ty, ct);
    bool f = ct == Type::F32;
    if (typeBytes(ty) == 4) d.out.fn = f ? lanes<Slct<uint32_t, float>>() : lanes<Slct<uint32_t, int32_t>>();
    if (typeBytes(ty) == 8) d.out.fn = f ? lanes<Slct<uint64_t, float>>() : lanes<Slct<uint64_t, int32_t>>();
  };
  t["mov"] = decodeMov;
  t["cvta"] = decodeCvta;
  t["isspacep"] = [](Dec& d) {
    static const char* kNames[] = {"global", "shared::cta", "shared::cluster", "local", "const", "param"};
    int s = -1;
    for (int i = 0; i < 6 && s < 0; ++i)
      if (d.take(kNames[i])) s = i;
    if (s < 0 && d.take("shared")) s = 1;
    if (s < 0) d.fail("a state space is missing");
    d.wantArgs(2, 2);
    d.out.d = d.predDst(d.arg(0));
    d.out.a = d.src(1, Type::U64);
    d.out.x[0] = (uint8_t)s;
    d.out.fn = isspacep;
  };
}

static const bool kAdded = (addLogicOps(opTable()), true);
}  // namespace ptxsim
