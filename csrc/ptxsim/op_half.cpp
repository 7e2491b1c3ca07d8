// float16 and bfloat16 arithmetic, scalar and packed (PTX ISA 9.7.4). Every operation is computed exactly or to odd in
// a wider format and rounded once.
#include "ops.h"

namespace ptxsim {

static const float* makeTable(const Narrow& f, uint32_t codes) {
  float* t = new float[codes];
  for (uint32_t i = 0; i < codes; ++i) t[i] = widen(i, f);
  return t;
}
const float* const kHalfTable = makeTable(kF16, 65536);
const float* const kE4m3Table = makeTable(kE4m3, 256);
const float* const kE5m2Table = makeTable(kE5m2, 256);

namespace {

// a*b + c rounded to odd in double: the product of two halves is exact there, and rounding to odd keeps the second
// rounding exact.
double fmaOdd(double a, double b, double c) {
  double p = a * b, s = p + c;
  if (!(std::fabs(s) < INFINITY)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0 && !(bits(s) & 1)) s = std::nextafter(s, err > 0 ? INFINITY : -INFINITY);
  return s;
}

enum Op { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs, kEx2, kTanh };
// x[0] ftz, x[1] sat, x[2] relu, x[3] NaN
template <bool Bfloat, Op op>
uint16_t compute(const Inst& in, uint16_t a, uint16_t b = 0, uint16_t c = 0) {
  constexpr Narrow F = Bfloat ? kBf16 : kF16;
  auto flushed = [&](uint16_t h) -> uint16_t { return in.x[0] && (h & 0x7fff) >> F.mant == 0 ? h & 0x8000 : h; };
  auto value = [](uint16_t h) -> double { return Bfloat ? fromBf16(h) : fromF16(h); };
  auto isNan = [](uint16_t h) { return (h & 0x7fffu) > F.inf; };
  a = flushed(a), b = flushed(b), c = flushed(c);
  const double x = value(a), y = value(b);
  double exact;
  switch (op) {
    case kNeg: return a ^ 0x8000;
    case kAbs: return a & 0x7fff;
    case kMin:
    case kMax: {
      if (in.x[3] && (isNan(a) || isNan(b))) return F.nan;
      const uint16_t r = minOrMax(a, b, F, op == kMin);
      return in.x[2] && (r & 0x8000) ? 0 : r;
    }
    case kAdd: exact = x + y; break;
    case kSub: exact = x - y; break;
    case kMul: exact = x * y; break;
    case kFma: exact = fmaOdd(x, y, value(c)); break;
    case kEx2: exact = std::exp2(x); break;
    case kTanh: exact = std::tanh(x); break;
  }
  const uint16_t r = flushed((uint16_t)narrowFrom(exact, F));
  if (isNan(r)) return in.x[1] ? 0 : F.nan;
  if (r & 0x8000 && (in.x[1] || in.x[2])) return 0;
  return in.x[1] && value(r) > 1 ? (uint16_t)narrowFrom(1.0, F) : r;
}
// T: uint16_t one value, uint32_t two.
template <bool Bfloat, Op op, class T, class... A>
struct OfHalves {
  T operator()(const Inst& in, A... a) const {
    const uint32_t low = compute<Bfloat, op>(in, (uint16_t)a...);
    return (T)(sizeof(T) == 2 ? low : low | (uint32_t)compute<Bfloat, op>(in, (uint16_t)((uint32_t)a >> 16)...) << 16);
  }
};
template <Op op, size_t sources>
void half(Dec& d) {
  const Type t = d.types[0];
  d.out.fn = byFlags(
      [](auto bfloat, auto packed) {
        using T = std::conditional_t<packed, uint32_t, uint16_t>;
        if constexpr (sources == 1) return lanes<OfHalves<bfloat, op, T, T>>();
        if constexpr (sources == 2) return lanes<OfHalves<bfloat, op, T, T, T>>();
        if constexpr (sources == 3) return lanes<OfHalves<bfloat, op, T, T, T, T>>();
      },
      t == Type::BF16 || t == Type::BF16x2, typeBytes(t) == 4);
}

constexpr char kModifiers[] = "(rn|approx) ftz? sat? relu? NaN? half";
const Forms kForms = {
    {"add", kModifiers, "d a b", half<kAdd, 2>}, {"sub", kModifiers, "d a b", half<kSub, 2>},
    {"mul", kModifiers, "d a b", half<kMul, 2>}, {"fma", kModifiers, "d a b c", half<kFma, 3>},
    {"min", kModifiers, "d a b", half<kMin, 2>}, {"max", kModifiers, "d a b", half<kMax, 2>},
    {"neg", kModifiers, "d a", half<kNeg, 1>},   {"abs", kModifiers, "d a", half<kAbs, 1>},
    {"ex2", kModifiers, "d a", half<kEx2, 1>},   {"tanh", kModifiers, "d a", half<kTanh, 1>},
};

}  // namespace
}  // namespace ptxsim
