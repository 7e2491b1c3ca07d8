// float32 and float64 arithmetic (PTX ISA 9.7.3). Approximate functions are computed in double and rounded, which is
// inside the error bounds the ISA gives for them.
#include <cfenv>
#include <cmath>

#include "half.h"
#include "ops.h"

namespace ptxsim {

bool decodeHalfArithmetic(Dec& d, const std::string& op);

namespace {

template <bool Ftz>
inline float in32(float f) {
  return Ftz ? flush(f) : f;
}
template <bool Ftz, bool Sat>
inline float out32(float f) {
  if (Sat) return f != f ? 0.0f : f < 0.0f ? 0.0f : f > 1.0f ? 1.0f : f;  // .sat: NaN gives +0
  f = canonical(f);
  return Ftz ? flush(f) : f;
}
#define FLOAT32(name, parameters)      \
  template <bool Z, bool S>            \
  struct name {                        \
    float operator() parameters const; \
  };                                   \
  template <bool Z, bool S>            \
  inline float name<Z, S>::operator() parameters const
FLOAT32(AddF, (float a, float b)) { return out32<Z, S>(in32<Z>(a) + in32<Z>(b)); }
FLOAT32(SubF, (float a, float b)) { return out32<Z, S>(in32<Z>(a) - in32<Z>(b)); }
FLOAT32(MulF, (float a, float b)) { return out32<Z, S>(in32<Z>(a) * in32<Z>(b)); }
FLOAT32(FmaF, (float a, float b, float c)) { return out32<Z, S>(__builtin_fmaf(in32<Z>(a), in32<Z>(b), in32<Z>(c))); }
FLOAT32(DivF, (float a, float b)) { return out32<Z, S>(in32<Z>(a) / in32<Z>(b)); }
FLOAT32(SqrtF, (float a)) { return out32<Z, S>(std::sqrt(in32<Z>(a))); }
FLOAT32(RcpF, (float a)) { return out32<Z, S>(1.0f / in32<Z>(a)); }
template <bool Z, bool S>
struct RsqrtF {
  float operator()(float a) const {
    a = in32<Z>(a);
    return out32<Z, S>((float)(1.0 / std::sqrt((double)a)));
  }
};
FLOAT32(SinF, (float a)) { return out32<Z, S>((float)std::sin((double)in32<Z>(a))); }
FLOAT32(CosF, (float a)) { return out32<Z, S>((float)std::cos((double)in32<Z>(a))); }
FLOAT32(Lg2F, (float a)) { return out32<Z, S>((float)std::log2((double)in32<Z>(a))); }
FLOAT32(Ex2F, (float a)) { return out32<Z, S>((float)std::exp2((double)in32<Z>(a))); }
FLOAT32(TanhF, (float a)) { return out32<Z, S>((float)std::tanh((double)a)); }
FLOAT32(AbsF, (float a)) { return in32<Z>(f32(bits(a) & 0x7fffffffu)); }
FLOAT32(NegF, (float a)) { return in32<Z>(f32(bits(a) ^ 0x80000000u)); }

// -0 is below +0; one NaN operand loses unless .NaN
template <bool Min>
inline float pick(float a, float b) {
  if (a == b) return (bits(a) >> 31) == (uint32_t)Min ? a : b;
  return (a < b) == Min ? a : b;
}
template <bool Min, bool Ftz, bool PropagateNan>
struct MinMaxF {
  float operator()(float a, float b) const {
    a = in32<Ftz>(a), b = in32<Ftz>(b);
    if (PropagateNan && (a != a || b != b)) return f32(kNan32);
    if (a != a) return canonical(b);
    if (b != b) return a;
    return pick<Min>(a, b);
  }
};
template <bool Min, bool Ftz, bool PropagateNan>
struct MinMaxXor {
  float operator()(float a, float b) const {
    a = in32<Ftz>(a), b = in32<Ftz>(b);
    uint32_t sign = (bits(a) ^ bits(b)) & 0x80000000u;
    if (PropagateNan && (a != a || b != b)) return f32(kNan32);
    if (a != a && b != b) return f32(kNan32);
    float x = std::fabs(a), y = std::fabs(b);
    float r = a != a ? y : b != b ? x : Min ? std::fmin(x, y) : std::fmax(x, y);
    return f32(bits(r) | sign);
  }
};

LANE(double, AddD, (double a, double b)) { return a + b; }
LANE(double, SubD, (double a, double b)) { return a - b; }
LANE(double, MulD, (double a, double b)) { return (a * b); }
LANE(double, FmaD, (double a, double b, double c)) { return __builtin_fma(a, b, c); }
LANE(double, DivD, (double a, double b)) { return a / b; }
LANE(double, SqrtD, (double a)) { return std::sqrt(a); }
LANE(double, RcpD, (double a)) { return 1.0 / a; }
LANE(double, RsqrtD, (double a)) { return 1.0 / std::sqrt(a); }
LANE(double, AbsD, (double a)) { return std::fabs(a); }
LANE(double, NegD, (double a)) { return -a; }
LANE(double, MinD, (double a, double b)) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
LANE(double, MaxD, (double a, double b)) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
// The upper half of 1/x, as a seed for Newton steps.
struct RcpSeed {
  double operator()(double a) const {
    uint64_t b = bits(1.0 / (std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a)) & 0xffffffff00000000ull;
    return bitsAs<double>(b);
  }
};
LANE(double, RsqrtSeed, (double a)) { return bitsAs<double>(bits(1.0 / std::sqrt(a)) & 0xffffffff00000000ull); }

// Directed rounding: the inner handler runs under the host's rounding mode. Its loads and stores cannot move across the
// calls.
int hostMode(int r) { return r == 1 ? FE_TOWARDZERO : r == 2 ? FE_DOWNWARD : FE_UPWARD; }
template <Handler H>
void directed(Warp& w, const Inst& in, uint32_t m) {
  std::fesetround(hostMode(in.x[4]));
  H(w, in, m);
  std::fesetround(FE_TONEAREST);
}

struct Mods {
  int rnd;
  bool ftz, sat;
};
Mods takeMods(Dec& d) {
  Mods m;
  m.rnd = d.takeOneOf({"rn", "rz", "rm", "rp"});
  m.ftz = d.take("ftz");
  m.sat = d.take("sat");
  d.out.x[4] = (uint8_t)std::max(0, m.rnd);
  return m;
}

template <template <bool, bool> class F>
Handler by32(const Mods& m) {
  static const Handler nearest[2][2] = {{lanes<F<0, 0>>(), lanes<F<0, 1>>()}, {lanes<F<1, 0>>(), lanes<F<1, 1>>()}};
  static const Handler rounded[2][2] = {{directed<lanes<F<0, 0>>()>, directed<lanes<F<0, 1>>()>},
                                        {directed<lanes<F<1, 0>>()>, directed<lanes<F<1, 1>>()>}};
  return (m.rnd > 0 ? rounded : nearest)[m.ftz][m.sat];
}
template <class F>
Handler by64(const Mods& m) {
  return m.rnd > 0 ? directed<lanes<F>()> : lanes<F>();
}
template <template <bool, bool, bool> class F>
Handler byOrder(bool min, bool ftz, bool nan) {
  static const Handler table[2][2][2] = {
      {{lanes<F<0, 0, 0>>(), lanes<F<0, 0, 1>>()}, {lanes<F<0, 1, 0>>(), lanes<F<0, 1, 1>>()}},
      {{lanes<F<1, 0, 0>>(), lanes<F<1, 0, 1>>()}, {lanes<F<1, 1, 0>>(), lanes<F<1, 1, 1>>()}}};
  return table[min][ftz][nan];
}

void arithmetic(Dec& d, const std::string& op) {
  if (decodeHalfArithmetic(d, op)) return;
  Mods m = takeMods(d);
  if (op == "fma" || op == "mad") {
    Type t = d.needType();
    setOperands(d, t, t, t, t);
    if (t == Type::F64) d.out.fn = by64<FmaD>(m);
    if (t == Type::F32) d.out.fn = by32<FmaF>(m);
    return;
  }
  if (op == "min" || op == "max") {
    bool nan = d.take("NaN"), xorsign = d.take("xorsign") && d.take("abs"), min = op == "min";
    Type t = d.needType();
    setOperands(d, t, t, t);
    if (t == Type::F64)
      d.out.fn = min ? lanes<MinD>() : lanes<MaxD>();
    else
      d.out.fn = xorsign ? byOrder<MinMaxXor>(min, m.ftz, nan) : byOrder<MinMaxF>(min, m.ftz, nan);
    return;
  }
  bool approx = d.take("approx"), full = d.take("full");
  Type t = d.needType();
  if (op == "abs" || op == "neg") {
    setOperands(d, t, t);
    if (t == Type::F64)
      d.out.fn = op == "abs" ? lanes<AbsD>() : lanes<NegD>();
    else
      d.out.fn = op == "abs" ? by32<AbsF>(m) : by32<NegF>(m);
    return;
  }
  setOperands(d, t, t, t);
  if (t == Type::F64) {
    if (op == "div" && (approx || full)) d.fail("no approximate float64 division exists");
    d.out.fn = op == "add"   ? by64<AddD>(m)
               : op == "sub" ? by64<SubD>(m)
               : op == "mul" ? by64<MulD>(m)
               : op == "div" ? by64<DivD>(m)
                             : nullptr;
  } else if (t == Type::F32) {
    d.out.fn = op == "add"   ? by32<AddF>(m)
               : op == "sub" ? by32<SubF>(m)
               : op == "mul" ? by32<MulF>(m)
               : op == "div" ? by32<DivF>(m)
                             : nullptr;
  }
}

template <template <bool, bool> class F, class D64>
void unaryFunction(Dec& d) {
  if (decodeHalfArithmetic(d, d.p.op[0])) return;
  Mods m = takeMods(d);
  d.take("approx");
  Type t = d.needType();
  setOperands(d, t, t);
  if (t == Type::F32) d.out.fn = by32<F>(m);
  if (t == Type::F64 && !std::is_same<D64, void>::value) {
    using Fn = std::conditional_t<std::is_same<D64, void>::value, RcpD, D64>;
    d.out.fn = by64<Fn>(m);
  }
}

template <class T>
void testp(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    T a = w.ptr<T>(in.a)[i];
    int c = std::fpclassify(a);
    bool t = in.x[0] == 0   ? c != FP_NAN && c != FP_INFINITE
             : in.x[0] == 1 ? c == FP_INFINITE
             : in.x[0] == 2 ? c != FP_NAN
             : in.x[0] == 3 ? c == FP_NAN
             : in.x[0] == 4 ? c == FP_NORMAL || c == FP_ZERO
                            : c == FP_SUBNORMAL;
    r |= (uint32_t)t << i;
  }
  w.setPred(in.d, m, r, w.validOf(in.a));
}
LANE(uint32_t, Copysign32, (uint32_t a, uint32_t b)) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
LANE(uint64_t, Copysign64, (uint64_t a, uint64_t b)) {
  return (a & 0x8000000000000000ull) | (b & 0x7fffffffffffffffull);
}

}  // namespace

static void addFloatOps(OpTable& t) {
  t["add"] = [](Dec& d) { arithmetic(d, "add"); };
  t["sub"] = [](Dec& d) { arithmetic(d, "sub"); };
  t["mul"] = [](Dec& d) { arithmetic(d, "mul"); };
  t["mad"] = [](Dec& d) { arithmetic(d, "mad"); };
  t["fma"] = [](Dec& d) { arithmetic(d, "fma"); };
  t["div"] = [](Dec& d) { arithmetic(d, "div"); };
  t["rem"] = [](Dec& d) { arithmetic(d, "rem"); };
  t["min"] = [](Dec& d) { arithmetic(d, "min"); };
  t["max"] = [](Dec& d) { arithmetic(d, "max"); };
  t["abs"] = [](Dec& d) { arithmetic(d, "abs"); };
  t["neg"] = [](Dec& d) { arithmetic(d, "neg"); };
  t["sqrt"] = unaryFunction<SqrtF, SqrtD>;
  t["rcp"] = [](Dec& d) {
    if (d.has("approx") && d.has("f64")) {
      d.take("approx");
      d.take("ftz");
      d.needType();
      setOperands(d, Type::F64, Type::F64);
      d.out.fn = lanes<RcpSeed>();
      return;
    }
    unaryFunction<RcpF, RcpD>(d);
  };
  t["rsqrt"] = [](Dec& d) {
    if (d.has("ftz") && d.has("f64")) {
      d.take("approx");
      d.take("ftz");
      d.needType();
      setOperands(d, Type::F64, Type::F64);
      d.out.fn = lanes<RsqrtSeed>();
      return;
    }
    unaryFunction<RsqrtF, RsqrtD>(d);
  };
  t["sin"] = unaryFunction<SinF, void>;
  t["cos"] = unaryFunction<CosF, void>;
  t["lg2"] = unaryFunction<Lg2F, void>;
  t["ex2"] = unaryFunction<Ex2F, void>;
  t["tanh"] = unaryFunction<TanhF, void>;
  t["testp"] = [](Dec& d) {
    int k = d.takeOneOf({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    Type ty = d.needType();
    d.wantArgs(2, 2);
    d.out.d = d.predDst(d.arg(0));
    d.out.a = d.src(1, ty);
    d.out.x[0] = (uint8_t)k;
    d.out.fn = ty == Type::F64 ? (Handler)testp<double> : (Handler)testp<float>;
  };
  t["copysign"] = [](Dec& d) {  // sign of a, magnitude of b
    Type ty = d.needType();
    setOperands(d, ty, ty, ty);
    d.out.fn = ty == Type::F64 ? lanes<Copysign64>() : lanes<Copysign32>();
  };
}

static const bool kAdded = (addFloatOps(opTable()), true);
}  // namespace ptxsim
