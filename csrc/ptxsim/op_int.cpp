// Integer arithmetic and bit-field instructions (PTX ISA 9.7.1, 9.7.2).
#include "ops.h"

namespace ptxsim {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
auto wider() {
  constexpr bool sign = std::is_signed<T>::value;
  if constexpr (sizeof(T) == 2) return std::conditional_t<sign, int32_t, uint32_t>();
  if constexpr (sizeof(T) == 4) return std::conditional_t<sign, int64_t, uint64_t>();
  if constexpr (sizeof(T) == 8) return std::conditional_t<sign, __int128, unsigned __int128>();
}
template <class T>
using W = decltype(wider<T>());

// Wrap-around arithmetic is done unsigned; the casts keep 16-bit promotion out of signed overflow.
TYPED(T, Add, (T a, T b)) { return (T)((U<T>)a + (U<T>)b); }
TYPED(T, Sub, (T a, T b)) { return (T)((U<T>)a - (U<T>)b); }
TYPED(T, MulLo, (T a, T b)) { return (T)((uint64_t)a * (uint64_t)b); }
TYPED(T, MulHi, (T a, T b)) { return (T)(((W<T>)a * (W<T>)b) >> (8 * sizeof(T))); }
TYPED(W<T>, MulWide, (T a, T b)) { return (W<T>)a * (W<T>)b; }
TYPED(T, MadLo, (T a, T b, T c)) { return (T)((uint64_t)a * (uint64_t)b + (uint64_t)c); }
TYPED(T, MadHi, (T a, T b, T c)) { return Add<T>()(MulHi<T>()(a, b), c); }
TYPED(W<T>, MadWide, (T a, T b, W<T> c)) { return (W<T>)((U<W<T>>)((W<T>)a * (W<T>)b) + (U<W<T>>)c); }
TYPED(T, Abs, (T a)) { return a < 0 ? (T)(0 - (U<T>)a) : a; }
TYPED(T, Neg, (T a)) { return (T)(0 - (U<T>)a); }
// Division by zero gives an unspecified value; all ones is what the hardware's sequence gives.
TYPED(T, Div, (T a, T b)) { return b == 0 ? (T)-1 : std::is_signed<T>::value && b == (T)-1 ? Neg<T>()(a) : (T)(a / b); }
TYPED(T, Rem, (T a, T b)) { return b == 0 ? a : std::is_signed<T>::value && b == (T)-1 ? (T)0 : (T)(a % b); }
TYPED(T, Min, (T a, T b)) { return std::min(a, b); }
TYPED(T, Max, (T a, T b)) { return std::max(a, b); }
TYPED(T, MinRelu, (T a, T b)) { return std::max<T>(0, std::min(a, b)); }
TYPED(T, MaxRelu, (T a, T b)) { return std::max<T>(0, std::max(a, b)); }
TYPED(T, Sad, (T a, T b, T c)) { return (T)((U<T>)c + (U<T>)(a < b ? (U<T>)b - (U<T>)a : (U<T>)a - (U<T>)b)); }
int32_t saturate(int64_t v) { return (int32_t)std::clamp<int64_t>(v, INT32_MIN, INT32_MAX); }
LANE(int32_t, AddSat, (int32_t a, int32_t b)) { return saturate((int64_t)a + b); }
LANE(int32_t, SubSat, (int32_t a, int32_t b)) { return saturate((int64_t)a - b); }
LANE(int32_t, MadHiSat, (int32_t a, int32_t b, int32_t c)) { return saturate(((int64_t)a * b >> 32) + c); }
template <class T, template <class> class F>
struct Pair16 {  // two 16-bit halves
  uint32_t operator()(uint32_t a, uint32_t b) const {
    F<T> f;
    return (uint32_t)(uint16_t)f((T)a, (T)b) | (uint32_t)(uint16_t)f((T)(a >> 16), (T)(b >> 16)) << 16;
  }
};

TYPED(uint32_t, Popc, (T a)) { return (uint32_t)__builtin_popcountll(a); }
TYPED(uint32_t, Clz, (T a)) { return a ? (uint32_t)__builtin_clzll(a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); }
TYPED(uint32_t, Bfind, (const Inst& in, T a)) {
  const U<T> v = (U<T>)(std::is_signed<T>::value && a < 0 ? ~a : a);
  if (v == 0) return kAll;
  const uint32_t left = Clz<U<T>>()(v);
  return in.x[0] ? left : 8 * sizeof(T) - 1 - left;
}
TYPED(T, Brev, (T a)) {
  T r = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) r = (T)(r << 1 | ((a >> i) & 1));
  return r;
}
// A field that reaches past the value goes on with zeros or its sign.
TYPED(T, Bfe, (T a, uint32_t b, uint32_t c)) {
  constexpr unsigned bits = 8 * sizeof(W<T>);
  const unsigned pos = std::min(b & 0xff, bits - 1), above = bits - std::min(c & 0xff, bits);
  if (above == bits) return 0;
  return (T)((W<T>)((W<U<T>>)((W<T>)a >> pos) << above) >> above);
}
TYPED(T, Bfi, (T a, T b, uint32_t c, uint32_t d)) {
  const unsigned bits = 8 * sizeof(T), pos = c & 0xff, len = d & 0xff;
  if (len == 0 || pos >= bits) return b;
  unsigned n = std::min(len, bits - pos);
  T keep = (T)((n >= bits ? ~(T)0 : (T)(((T)1 << n) - 1)) << pos);
  return (T)((b & ~keep) | ((T)(a << pos) & keep));
}
TYPED(T, Szext, (const Inst& in, T a, uint32_t n)) { return Bfe<T>()(a, 0, in.x[0] ? n & 31 : std::min(n, 32u)); }
LANE(uint32_t, Bmsk, (const Inst& in, uint32_t a, uint32_t b)) {
  if (in.x[0]) a &= 31, b &= 31;
  if (a >= 32 || b == 0) return 0;
  return (b >= 32 ? kAll : (1u << b) - 1) << a;
}
// The position of the n-th set bit, counted from bit `base` upwards (n > 0) or downwards (n < 0).
LANE(uint32_t, Fns, (uint32_t mask, uint32_t base, int32_t n)) {
  if (base > 31) return kAll;
  if (n == 0) return (mask >> base) & 1 ? base : kAll;
  int step = n > 0 ? 1 : -1, left = n > 0 ? n : -n;
  for (int i = (int)base; i >= 0 && i < 32; i += step)
    if ((mask >> i) & 1 && --left == 0) return (uint32_t)i;
  return kAll;
}
// dp4a, dp2a: c and the products of the N parts of a with bytes of b, of which x[0] says the upper two.
template <unsigned N>
struct Dot {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b, uint32_t c) const {
    auto part = [](uint32_t v, unsigned at, unsigned width, bool sign) {
      v <<= 32 - width - at;
      return sign ? (uint32_t)((int32_t)v >> (32 - width)) : v >> (32 - width);
    };
    for (unsigned i = 0; i < N; ++i)
      c += part(a, 32 / N * i, 32 / N, in.x[1]) * part(b, 8 * i + 16 * in.x[0], 8, in.x[2]);
    return c;
  }
};
template <unsigned N>
void dot(Dec& d) {
  d.out.x[1] = isSigned(d.types[0]);
  d.out.x[2] = isSigned(d.types[1]);
  d.out.fn = lanes<Dot<N>>();
}

// ---- extended precision: the carry flag lives per lane in Warp::carry
enum Carry { CarryAdd, CarrySub, CarryMadLo, CarryMadHi };
template <class T, int Op>  // x[0] carry in, x[1] carry out
void withCarry(Warp& w, const Inst& in, uint32_t m) {
  T r[kLanes];
  uint32_t carry = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    const T a = w.ptr<T>(in.a)[i], b = w.ptr<T>(in.b)[i], c = w.ptr<T>(in.c)[i];
    const unsigned __int128 x = (U<T>)(Op == CarryMadLo ? MulLo<T>()(a, b) : Op == CarryMadHi ? MulHi<T>()(a, b) : a);
    const unsigned __int128 y = (U<T>)(Op < CarryMadLo ? b : c), more = in.x[0] ? w.carry >> i & 1 : 0;
    const unsigned __int128 wide = Op == CarrySub ? x - y - more : x + y + more;
    r[i] = (T)wide;
    carry |= (uint32_t)(wide >> (8 * sizeof(T)) & 1) << i;
  }
  storeLanes(w, in.d, r, m);
  if (in.x[1]) w.carry = (w.carry & ~m) | (carry & m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}
void carry(Dec& d) {  // add.cc, addc, addc.cc, ...
  const std::vector<std::string>& op = d.p.op;
  const int which = op[0][0] == 'a' ? CarryAdd : op[0][0] == 's' ? CarrySub : CarryMadLo + d.out.x[0];
  d.out.x[0] = op[0].back() == 'c';
  d.out.x[1] = std::find(op.begin(), op.end(), "cc") != op.end();
  d.out.fn = ofType<uint32_t, int32_t, uint64_t, int64_t>(d.types[0], [&](auto t) {
    using T = decltype(t);
    return std::array<Handler, 4>{withCarry<T, CarryAdd>, withCarry<T, CarrySub>, withCarry<T, CarryMadLo>,
                                  withCarry<T, CarryMadHi>}[(size_t)which];
  });
}

template <template <class> class F>
void byTypeOrPair(Dec& d) {
  byType<F>(d);
  if (d.types[0] == Type::U16x2) d.out.fn = lanes<Pair16<uint16_t, F>>();
  if (d.types[0] == Type::S16x2) d.out.fn = lanes<Pair16<int16_t, F>>();
}

const Forms kForms = {
    {"add|sub", "cc bits", "d a b", carry},
    {"mad", "cc lo|hi bits", "d a b c", carry},
    {"addc|subc", "(cc) bits", "d a b", carry},
    {"madc", "(cc) lo|hi bits", "d a b c", carry},
    {"add", "sat s32", "d a b", lanes<AddSat>()},
    {"sub", "sat s32", "d a b", lanes<SubSat>()},
    {"add", "bits", "d a b", byTypeOrPair<Add>},
    {"sub", "bits", "d a b", byTypeOrPair<Sub>},
    {"mul", "lo bits", "d a b", byType<MulLo>},
    {"mul", "hi bits", "d a b", byType<MulHi>},
    {"mul", "wide bits", "d:wide a b", byType<MulWide, uint16_t, int16_t, uint32_t, int32_t>},
    {"mad", "hi sat s32", "d a b c", lanes<MadHiSat>()},
    {"mad", "lo bits", "d a b c", byType<MadLo>},
    {"mad", "hi bits", "d a b c", byType<MadHi>},
    {"mad", "wide bits", "d:wide a b c:wide", byType<MadWide, uint16_t, int16_t, uint32_t, int32_t>},
    {"sad", "int", "d a b c", byType<Sad>},
    {"div", "int", "d a b", byType<Div>},
    {"rem", "int", "d a b", byType<Rem>},
    {"abs", "int", "d a", byType<Abs, int16_t, int32_t, int64_t>},
    {"neg", "int", "d a", byType<Neg>},
    {"min", "relu s32", "d a b", lanes<MinRelu<int32_t>>()},
    {"max", "relu s32", "d a b", lanes<MaxRelu<int32_t>>()},
    {"min", "relu s16x2", "d a b", lanes<Pair16<int16_t, MinRelu>>()},
    {"max", "relu s16x2", "d a b", lanes<Pair16<int16_t, MaxRelu>>()},
    {"min", "int", "d a b", byTypeOrPair<Min>},
    {"max", "int", "d a b", byTypeOrPair<Max>},
    {"popc", "type", "d:u32 a", byWidth<Popc>},
    {"clz", "bits", "d:u32 a", byType<Clz, uint32_t, uint64_t>},
    {"bfind", "shiftamt? int", "d:u32 a", byType<Bfind>},
    {"brev", "type", "d a", byWidth<Brev>},
    {"bfe", "int", "d a b:u32 c:u32", byType<Bfe>},
    {"bfi", "bits", "d a b c:u32 e:u32", byType<Bfi, uint32_t, uint64_t>},
    {"szext", "clamp|wrap bits", "d a b:u32", byType<Szext, uint32_t, int32_t>},
    {"bmsk", "clamp|wrap type", "d:u32 a:u32 b:u32", lanes<Bmsk>()},
    {"fns", "type", "d:u32 a:u32 b:u32 c:s32", lanes<Fns>()},
    {"dp4a", "type type", "d:u32 a:u32 b:u32 c:u32", dot<4>},
    {"dp2a", "lo|hi type type", "d:u32 a:u32 b:u32 c:u32", dot<2>},
};

}  // namespace
}  // namespace ptxsim
