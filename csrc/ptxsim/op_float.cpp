// float32 and float64 arithmetic (PTX ISA 9.7.3). Approximate functions are computed in double and rounded, or err on
// purpose inside the bounds that the ISA gives for them (Options::approximate).
#include <cfenv>

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

template <class Bits>
constexpr Bits kSign = (Bits)1 << (8 * sizeof(Bits) - 1);
template <bool Ftz, class T>
inline T flushIf(T f) {
  if constexpr (Ftz && sizeof(T) == 4) return flush(f);
  return f;
}
template <class F, bool Ftz, bool Sat, class = decltype(&F::operator())>
struct Rounded;
template <class F, bool Ftz, bool Sat, class T, class... A>
struct Rounded<F, Ftz, Sat, T (F::*)(A...) const> {
  T operator()(A... a) const {
    const T f = F()(flushIf<Ftz>(a)...);
    if constexpr (sizeof(T) == 8) return f;
    if (Sat) return f != f ? 0.0f : f < 0.0f ? 0.0f : f > 1.0f ? 1.0f : f;  // .sat: NaN gives +0
    return flushIf<Ftz>(canonical((float)f));
  }
};

// The same, where the launch asks for it up to so many units in the last place off, on the exact value's side. What an
// argument gives is the same everywhere, as on hardware.
template <template <class> class F, bool Ftz, bool Sat, unsigned kUnits, class = decltype(&F<float>::operator())>
struct Approximate;
template <template <class> class F, bool Ftz, bool Sat, unsigned kUnits, class... A>
struct Approximate<F, Ftz, Sat, kUnits, float (F<float>::*)(A...) const> {
  float operator()(const Warp& w, const Inst&, A... a) const {
    const float r = Rounded<F<float>, Ftz, Sat>()(a...);
    const uint32_t asked = w.launch->opt.approximate;
    const double exact = asked && std::isnormal(r) ? F<double>()(a...) : r;
    if (exact == r) return r;
    const uint32_t units = ((bits(r) ^ asked * 0x9e3779b9u) * 0x85ebca6bu >> 8) % (kUnits + 1);
    return f32(std::fabs(exact) > std::fabs(r) ? bits(r) + units : bits(r) - units);
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
void rounded(Dec& d) {  // x[1] ftz, x[2] sat
  d.out.fn = byFlags(
      [](auto wide, auto away, auto ftz, auto sat) {
        constexpr Handler h = wide ? lanes<F<double>>() : lanes<Rounded<F<float>, ftz, sat>>();
        return away ? directed<h> : h;
      },
      d.types[0] == Type::F64, d.out.x[0] > 1, d.out.x[1], d.out.x[2]);
}

template <template <class> class F, unsigned kUnits>
void approximate(Dec& d) {  // x[3] approx or full
  if (!d.out.x[3] || d.types[0] == Type::F64) return rounded<F>(d);
  auto as = [](auto ftz, auto sat) { return lanes<Approximate<F, ftz, sat, kUnits>>(); };
  d.out.fn = byFlags(as, d.out.x[1], d.out.x[2]);
}

// -0 is below +0; one NaN operand loses unless .NaN. .xorsign: of the magnitudes, with the sign of the product.
template <class T, bool Min, bool Xorsign, bool Ftz, bool PropagateNan>
struct MinMax {
  T choose(T a, T b) const {
    if (PropagateNan && (a != a || b != b)) return canonical((T)NAN);
    if (a != a) return canonical(b);
    if (b != b) return a;
    if (a == b) return (bits(a) >> (8 * sizeof(T) - 1)) == Min ? a : b;
    return (a < b) == Min ? a : b;
  }
  T operator()(T a, T b) const {
    if constexpr (!Xorsign) return choose(flushIf<Ftz>(a), flushIf<Ftz>(b));
    const T r = choose(flushIf<Ftz>(std::fabs(a)), flushIf<Ftz>(std::fabs(b)));
    return r != r ? r : std::copysign(r, std::signbit(a) == std::signbit(b) ? (T)1 : (T)-1);
  }
};
template <bool Min, bool Xorsign>
void minMax(Dec& d) {  // x[0] ftz, x[1] NaN
  d.out.fn =
      byFlags([](auto wide, auto ftz,
                 auto nan) { return lanes<MinMax<std::conditional_t<wide, double, float>, Min, Xorsign, ftz, nan>>(); },
              d.types[0] == Type::F64, d.out.x[0], d.out.x[1]);
}

// The upper half of a value, as a seed for Newton steps.
double seed(double x) { return bitsAs<double>(bits(x) & 0xffffffff00000000ull); }
LANE(double, RcpSeed, (double a)) {
  return seed(1.0 / (std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a));
}
LANE(double, RsqrtSeed, (double a)) { return seed(1.0 / std::sqrt(a)); }

// Of the bits. x[0]: ftz
template <class T>
T flushed(const Inst& in, T a) {
  return sizeof(T) == 4 && in.x[0] ? (T)bits(flush(f32((uint32_t)a))) : a;
}
TYPED(T, Abs, (const Inst& in, T a)) { return flushed<T>(in, a & ~kSign<T>); }
TYPED(T, Neg, (const Inst& in, T a)) { return flushed<T>(in, a ^ kSign<T>); }
TYPED(T, Copysign, (T a, T b)) { return (a & kSign<T>) | (b & ~kSign<T>); }  // sign of a, magnitude of b

TYPED(bool, Testp, (const Inst& in, T a)) {
  constexpr unsigned nan = 1u << FP_NAN, infinite = 1u << FP_INFINITE, zero = 1u << FP_ZERO, normal = 1u << FP_NORMAL,
                     subnormal = 1u << FP_SUBNORMAL;
  constexpr unsigned accepted[] = {zero | normal | subnormal, infinite, ~nan, nan, normal | zero, subnormal};
  return accepted[in.x[0]] >> std::fpclassify(a) & 1;
}

constexpr char kRounded[] = "rn|rz|rm|rp? ftz? sat? float",
               kApproximate[] = "rn|rz|rm|rp? ftz? sat? approx|full? float",
               kFunction[] = "rn|rz|rm|rp? ftz? sat? approx? f32";
const Forms kForms = {
    {"add", kRounded, "d a b", rounded<Add>},
    {"sub", kRounded, "d a b", rounded<Sub>},
    {"mul", kRounded, "d a b", rounded<Mul>},
    {"fma|mad", kRounded, "d a b c", rounded<Fma>},
    {"div", kRounded, "d a b", rounded<Div>},
    {"div", "rn|rz|rm|rp? ftz? sat? approx|full? f32", "d a b", approximate<Div, 2>},
    {"min", "xorsign abs ftz? NaN? f32", "d a b", minMax<true, true>},
    {"max", "xorsign abs ftz? NaN? f32", "d a b", minMax<false, true>},
    {"min", "ftz? NaN? float", "d a b", minMax<true, false>},
    {"max", "ftz? NaN? float", "d a b", minMax<false, false>},
    {"abs", "ftz? float", "d a", byWidth<Abs>},
    {"neg", "ftz? float", "d a", byWidth<Neg>},
    {"rcp", "approx (ftz) f64", "d a", lanes<RcpSeed>()},
    {"rsqrt", "(approx) ftz f64", "d a", lanes<RsqrtSeed>()},
    {"sqrt", kApproximate, "d a", approximate<Sqrt, 1>},
    {"rcp", kApproximate, "d a", approximate<Rcp, 1>},
    {"rsqrt", kApproximate, "d a", approximate<Rsqrt, 1>},
    {"sin", kFunction, "d a", approximate<Sin, 1>},
    {"cos", kFunction, "d a", approximate<Cos, 1>},
    {"lg2", kFunction, "d a", approximate<Lg2, 2>},
    {"ex2", kFunction, "d a", approximate<Ex2, 2>},
    {"tanh", kFunction, "d a", approximate<Tanh, 4096>},
    {"testp", "finite|infinite|number|notanumber|normal|subnormal float", "d:pred a", byType<Testp, float, double>},
    {"copysign", "float", "d a b", byWidth<Copysign>},
};

}  // namespace
}  // namespace ptxsim
