// float16 and bfloat16 arithmetic, scalar and packed (PTX ISA 9.7.4). Every operation is computed exactly or to odd in
// a wider format and rounded once.
#include <cmath>

#include "half.h"
#include "ops.h"

namespace ptxsim {
namespace {

float* makeHalfTable() {
  float* t = new float[65536];
  for (uint32_t i = 0; i < 65536; ++i) t[i] = widen(i, kF16);
  return t;
}
float* makeByteTable(const Narrow& f) {
  float* t = new float[256];
  for (uint32_t i = 0; i < 256; ++i) t[i] = widen(i, f);
  return t;
}

struct Half {
  static float get(uint16_t h) { return fromF16(h); }
  static uint16_t put(float f) { return toF16(f); }
  static uint16_t put(double f) { return (uint16_t)narrowFromDouble(f, kF16); }
  static constexpr uint16_t nan = 0x7fff, minNormal = 0x0400;
};
struct Bfloat {
  static float get(uint16_t h) { return fromBf16(h); }
  static uint16_t put(float f) { return toBf16(f); }
  static uint16_t put(double f) { return (uint16_t)narrowFromDouble(f, kBf16); }
  static constexpr uint16_t nan = 0x7fff, minNormal = 0x0080;
};

// a*b + c rounded to odd in double: the product of two halves is exact there, and rounding to odd keeps the second
// rounding exact.
double fmaOdd(double a, double b, double c) {
  double p = a * b, s = p + c;
  if (!(std::fabs(s) < INFINITY)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0 && !(bits(s) & 1)) s = std::nextafter(s, err > 0 ? INFINITY : -INFINITY);
  return s;
}

// x[0] ftz, x[1] sat, x[2] relu, x[3] NaN
template <class H>
uint16_t finish(const Inst& in, uint16_t r) {
  if ((r & 0x7fff) > (std::is_same<H, Half>::value ? 0x7c00 : 0x7f80)) return in.x[1] ? 0 : H::nan;
  if (in.x[0] && (r & 0x7fff) < H::minNormal) r &= 0x8000;
  if (in.x[2] && (r & 0x8000)) return 0;
  if (in.x[1]) {
    float f = H::get(r);
    return f < 0 ? 0 : f > 1 ? H::put(1.0f) : r == 0x8000 ? 0 : r;
  }
  return r;
}
template <class H>
uint16_t source(const Inst& in, uint16_t h) {
  return in.x[0] && (h & 0x7fff) < H::minNormal ? h & 0x8000 : h;
}

enum { kAdd, kSub, kMul, kMin, kMax, kNeg, kAbs, kEx2, kTanh };
template <class H, int Op>
uint16_t two(const Inst& in, uint16_t a, uint16_t b) {
  a = source<H>(in, a), b = source<H>(in, b);
  float x = H::get(a), y = H::get(b);
  switch (Op) {
    case kAdd: return finish<H>(in, H::put((double)x + (double)y));
    case kSub: return finish<H>(in, H::put((double)x - (double)y));
    case kMul: return finish<H>(in, H::put((double)x * (double)y));
    default: {
      bool nx = x != x, ny = y != y;
      if ((nx && ny) || (in.x[3] && (nx || ny))) return H::nan;
      uint16_t r;
      if (nx)
        r = b;
      else if (ny)
        r = a;
      else if (x == y)
        r = ((a >> 15) == 1) == (Op == kMin) ? a : b;
      else
        r = (x < y) == (Op == kMin) ? a : b;
      return in.x[2] && (r & 0x8000) ? 0 : r;
    }
  }
}
template <class H, int Op>
uint16_t one(const Inst& in, uint16_t a) {
  switch (Op) {
    case kNeg: return source<H>(in, a) ^ 0x8000;
    case kAbs: return source<H>(in, a) & 0x7fff;
    case kEx2: return finish<H>(in, H::put(std::exp2((double)H::get(source<H>(in, a)))));
    default: return finish<H>(in, H::put(std::tanh((double)H::get(a))));
  }
}
template <class H>
uint16_t three(const Inst& in, uint16_t a, uint16_t b, uint16_t c) {
  return finish<H>(in, H::put(fmaOdd(H::get(source<H>(in, a)), H::get(source<H>(in, b)), H::get(source<H>(in, c)))));
}
template <class H, int Op>
struct One {
  uint16_t operator()(const Inst& in, uint16_t a) const { return one<H, Op>(in, a); }
};
template <class H, int Op>
struct OneX2 {
  uint32_t operator()(const Inst& in, uint32_t a) const {
    return one<H, Op>(in, (uint16_t)a) | (uint32_t)one<H, Op>(in, (uint16_t)(a >> 16)) << 16;
  }
};
template <class H, int Op>
struct Two {
  uint16_t operator()(const Inst& in, uint16_t a, uint16_t b) const { return two<H, Op>(in, a, b); }
};
template <class H, int Op>
struct TwoX2 {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b) const {
    return two<H, Op>(in, (uint16_t)a, (uint16_t)b) | (uint32_t)two<H, Op>(in, (uint16_t)(a >> 16), (uint16_t)(b >> 16))
                                                          << 16;
  }
};
template <class H>
struct Three {
  uint16_t operator()(const Inst& in, uint16_t a, uint16_t b, uint16_t c) const { return three<H>(in, a, b, c); }
};
template <class H>
struct ThreeX2 {
  uint32_t operator()(const Inst& in, uint32_t a, uint32_t b, uint32_t c) const {
    return three<H>(in, (uint16_t)a, (uint16_t)b, (uint16_t)c) |
           (uint32_t)three<H>(in, (uint16_t)(a >> 16), (uint16_t)(b >> 16), (uint16_t)(c >> 16)) << 16;
  }
};

template <int Op>
Handler pickOne(Type t) {
  return t == Type::F16     ? lanes<One<Half, Op>>()
         : t == Type::BF16  ? lanes<One<Bfloat, Op>>()
         : t == Type::F16x2 ? lanes<OneX2<Half, Op>>()
                            : lanes<OneX2<Bfloat, Op>>();
}
template <int Op>
Handler pickTwo(Type t) {
  return t == Type::F16     ? lanes<Two<Half, Op>>()
         : t == Type::BF16  ? lanes<Two<Bfloat, Op>>()
         : t == Type::F16x2 ? lanes<TwoX2<Half, Op>>()
                            : lanes<TwoX2<Bfloat, Op>>();
}

}  // namespace

const float* const kHalfTable = makeHalfTable();
const float* const kE4m3Table = makeByteTable(kE4m3);
const float* const kE5m2Table = makeByteTable(kE5m2);

// false: not a half type
bool decodeHalfArithmetic(Dec& d, const std::string& op) {
  Type t = Type::None;
  for (size_t i = 1; i < d.p.op.size() && t == Type::None; ++i) t = typeFromName(d.p.op[i]);
  if (t != Type::F16 && t != Type::BF16 && t != Type::F16x2 && t != Type::BF16x2) return false;
  d.take("rn");
  d.take("approx");
  d.out.x[0] = d.take("ftz");
  d.out.x[1] = d.take("sat");
  d.out.x[2] = d.take("relu");
  d.out.x[3] = d.take("NaN");
  t = d.needType();
  if (op == "fma") {
    setOperands(d, t, t, t, t);
    d.out.fn = t == Type::F16     ? lanes<Three<Half>>()
               : t == Type::BF16  ? lanes<Three<Bfloat>>()
               : t == Type::F16x2 ? lanes<ThreeX2<Half>>()
                                  : lanes<ThreeX2<Bfloat>>();
    return true;
  }
  if (op == "neg" || op == "abs" || op == "ex2" || op == "tanh") {
    setOperands(d, t, t);
    d.out.fn = op == "neg"   ? pickOne<kNeg>(t)
               : op == "abs" ? pickOne<kAbs>(t)
               : op == "ex2" ? pickOne<kEx2>(t)
                             : pickOne<kTanh>(t);
    return true;
  }
  if (op == "add" || op == "sub" || op == "mul" || op == "min" || op == "max") {
    setOperands(d, t, t, t);
    d.out.fn = op == "add"   ? pickTwo<kAdd>(t)
               : op == "sub" ? pickTwo<kSub>(t)
               : op == "mul" ? pickTwo<kMul>(t)
               : op == "min" ? pickTwo<kMin>(t)
                             : pickTwo<kMax>(t);
    return true;
  }
  return false;
}

}  // namespace ptxsim
