// float32 and float64 arithmetic (PTX ISA 9.7.3). Approximate functions are computed in double and rounded, which is
// inside the error bounds the ISA gives for them.
#include <cfenv>
#include <cmath>

#include "ops.h"

namespace ptxsim {
namespace {

TYPED(T, Add, (T a, T b)) { return a + b; }
TYPED(T, Sub, (T a, T b)) { return a - b; }
TYPED(T, Mul, (T a, T b)) { return a * b; }
TYPED(T, Fma, (T a, T b, T c)) { return std::fma(a, b, c); }
TYPED(T, Div, (T a, T b)) { return a / b; }
TYPED(T, Sqrt, (T a)) { return std::sqrt(a); }
TYPED(T, Rcp, (T a)) { return 1 / a; }
TYPED(T, Rsqrt, (T a)) { return (T)(1.0 / std::sqrt((double)a)); }
TYPED(T, Sin, (T a)) { return (T)std::sin((double)a); }
TYPED(T, Cos, (T a)) { return (T)std::cos((double)a); }
TYPED(T, Lg2, (T a)) { return (T)std::log2((double)a); }
TYPED(T, Ex2, (T a)) { return (T)std::exp2((double)a); }
TYPED(T, Tanh, (T a)) { return (T)std::tanh((double)a); }

template <bool Ftz>
inline float in32(float f) {
  return Ftz ? flush(f) : f;
}
template <class F, bool Ftz, bool Sat, class = decltype(&F::operator())>
struct Float32;
template <class F, bool Ftz, bool Sat, class... A>
struct Float32<F, Ftz, Sat, float (F::*)(A...) const> {
  float operator()(A... a) const {
    const float f = F()(in32<Ftz>(a)...);
    if (Sat) return f != f ? 0.0f : f < 0.0f ? 0.0f : f > 1.0f ? 1.0f : f;  // .sat: NaN gives +0
    return in32<Ftz>(canonical(f));
  }
};

// x[0]: 0 none, then the rounding modes. Under a directed one the handler runs under the host's: its loads and stores
// cannot move across the calls.
template <Handler H>
void directed(Warp& w, const Inst& in, uint32_t m) {
  const int modes[] = {FE_TONEAREST, FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  std::fesetround(modes[in.x[0]]);
  H(w, in, m);
  std::fesetround(FE_TONEAREST);
}
template <template <class> class F>
void by32(Dec& d) {  // x[1] ftz, x[2] sat
  d.out.fn = byFlags(
      [](auto away, auto ftz, auto sat) {
        constexpr Handler h = lanes<Float32<F<float>, ftz, sat>>();
        return away ? directed<h> : h;
      },
      d.out.x[0] > 1, d.out.x[1], d.out.x[2]);
}
template <template <class> class F>
void by64(Dec& d) {
  d.out.fn = d.out.x[0] > 1 ? directed<lanes<F<double>>()> : lanes<F<double>>();
}

// -0 is below +0; one NaN operand loses unless .NaN; .xorsign takes magnitudes, and the sign from both.
template <bool Min, bool Xorsign, bool Ftz, bool PropagateNan>
struct MinMax {
  float operator()(float a, float b) const {
    a = in32<Ftz>(a), b = in32<Ftz>(b);
    if (PropagateNan && (a != a || b != b)) return f32(kNan32);
    const uint32_t sign = Xorsign ? (bits(a) ^ bits(b)) & 0x80000000u : 0;
    if (Xorsign) a = std::fabs(a), b = std::fabs(b);
    if (a != a) a = canonical(b);
    if (b != b) b = a;
    const float r = (a == b ? (bits(a) >> 31) == (uint32_t)Min : (a < b) == Min) ? a : b;
    return Xorsign && r == r ? f32(bits(r) | sign) : r;
  }
};
template <bool Min, bool Xorsign>
void minMax(Dec& d) {
  d.out.fn =
      byFlags([](auto ftz, auto nan) { return lanes<MinMax<Min, Xorsign, ftz, nan>>(); }, d.out.x[0], d.out.x[1]);
}
LANE(double, MinD, (double a, double b)) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
LANE(double, MaxD, (double a, double b)) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}

// The upper half of a value, as a seed for Newton steps.
double seed(double x) { return bitsAs<double>(bits(x) & 0xffffffff00000000ull); }
LANE(double, RcpSeed, (double a)) {
  return seed(1.0 / (std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a));
}
LANE(double, RsqrtSeed, (double a)) { return seed(1.0 / std::sqrt(a)); }

// Of the bits.
template <class T>
constexpr T kSign = (T)1 << (8 * sizeof(T) - 1);
LANE(float, AbsF, (const Inst& in, uint32_t a)) {
  return in.x[0] ? flush(f32(a & ~kSign<uint32_t>)) : f32(a & ~kSign<uint32_t>);
}
LANE(float, NegF, (const Inst& in, uint32_t a)) {
  return in.x[0] ? flush(f32(a ^ kSign<uint32_t>)) : f32(a ^ kSign<uint32_t>);
}
LANE(double, AbsD, (double a)) { return std::fabs(a); }
LANE(double, NegD, (double a)) { return -a; }
TYPED(T, Copysign, (T a, T b)) { return (a & kSign<T>) | (b & ~kSign<T>); }  // sign of a, magnitude of b

TYPED(bool, Testp, (const Inst& in, T a)) {
  constexpr unsigned nan = 1u << FP_NAN, infinite = 1u << FP_INFINITE, zero = 1u << FP_ZERO, normal = 1u << FP_NORMAL,
                     subnormal = 1u << FP_SUBNORMAL;
  constexpr unsigned accepted[] = {zero | normal | subnormal, infinite, ~nan, nan, normal | zero, subnormal};
  return accepted[in.x[0]] >> std::fpclassify(a) & 1;
}

constexpr char k32[] = "rn|rz|rm|rp? ftz? sat? (approx|full) f32", k64[] = "rn|rz|rm|rp? (ftz) (sat) f64";
const Forms kForms = {
    {"add", k32, "d a b", by32<Add>},
    {"add", k64, "d a b", by64<Add>},
    {"sub", k32, "d a b", by32<Sub>},
    {"sub", k64, "d a b", by64<Sub>},
    {"mul", k32, "d a b", by32<Mul>},
    {"mul", k64, "d a b", by64<Mul>},
    {"div", k32, "d a b", by32<Div>},
    {"div", k64, "d a b", by64<Div>},
    {"fma", k32, "d a b c", by32<Fma>},
    {"fma", k64, "d a b c", by64<Fma>},
    {"mad", k32, "d a b c", by32<Fma>},
    {"mad", k64, "d a b c", by64<Fma>},
    {"min", "xorsign abs ftz? NaN? f32", "d a b", minMax<true, true>},
    {"max", "xorsign abs ftz? NaN? f32", "d a b", minMax<false, true>},
    {"min", "ftz? NaN? f32", "d a b", minMax<true, false>},
    {"max", "ftz? NaN? f32", "d a b", minMax<false, false>},
    {"min", "f64", "d a b", lanes<MinD>()},
    {"max", "f64", "d a b", lanes<MaxD>()},
    {"abs", "ftz? f32", "d a", lanes<AbsF>()},
    {"abs", "f64", "d a", lanes<AbsD>()},
    {"neg", "ftz? f32", "d a", lanes<NegF>()},
    {"neg", "f64", "d a", lanes<NegD>()},
    {"sqrt", k32, "d a", by32<Sqrt>},
    {"sqrt", k64, "d a", by64<Sqrt>},
    {"rcp", k32, "d a", by32<Rcp>},
    {"rcp", "approx (ftz) f64", "d a", lanes<RcpSeed>()},
    {"rcp", k64, "d a", by64<Rcp>},
    {"rsqrt", k32, "d a", by32<Rsqrt>},
    {"rsqrt", "(approx) ftz f64", "d a", lanes<RsqrtSeed>()},
    {"rsqrt", "(approx) f64", "d a", by64<Rsqrt>},
    {"sin", k32, "d a", by32<Sin>},
    {"cos", k32, "d a", by32<Cos>},
    {"lg2", k32, "d a", by32<Lg2>},
    {"ex2", k32, "d a", by32<Ex2>},
    {"tanh", k32, "d a", by32<Tanh>},
    {"testp", "finite|infinite|number|notanumber|normal|subnormal f32", "d:pred a", lanes<Testp<float>>()},
    {"testp", "finite|infinite|number|notanumber|normal|subnormal f64", "d:pred a", lanes<Testp<double>>()},
    {"copysign", "type", "d a b", byWidth<Copysign>},
};

}  // namespace
}  // namespace ptxsim
