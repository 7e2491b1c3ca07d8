// cvt (PTX ISA 9.7.9.21 and on). The general path takes every lane through an exact intermediate; the common pairs have
// their own.
#include <algorithm>
#include <cmath>

#include "half.h"
#include "ops.h"

namespace ptxsim {
namespace {

constexpr Narrow kF32{23, -126, 0x7f800000u, 0x7f7fffffu, 0x7fffffffu, 31};

struct Plan {  // packed into Inst::x: x[0] dst type, x[1] src type, x[2] rounding, x[3] flags, x[4] dst register bytes,
               // x[5] src register bytes
  enum { Ftz = 1, Sat = 2, SatFinite = 4, Relu = 8, ToIntegral = 16 };
};

double roundIntegral(double x, Round r) {
  switch (r) {
    case Round::Nearest: return std::nearbyint(x);
    case Round::Zero: return std::trunc(x);
    case Round::Down: return std::floor(x);
    case Round::Up: return std::ceil(x);
    default: return std::round(x);
  }
}
double toDouble(Type t, uint64_t v) {
  switch (t) {
    case Type::F64: return bitsAs<double>(v);
    case Type::F32: return f32((uint32_t)v);
    case Type::F16: return fromF16((uint16_t)v);
    default: return fromBf16((uint16_t)v);
  }
}
int64_t signExtend(uint64_t v, unsigned bytes) {
  return bytes == 8 ? (int64_t)v : (int64_t)(v << (64 - 8 * bytes)) >> (64 - 8 * bytes);
}
uint64_t zeroExtend(uint64_t v, unsigned bytes) { return bytes == 8 ? v : v & ((1ull << (8 * bytes)) - 1); }
const Narrow& format(Type t) { return t == Type::F32 ? kF32 : t == Type::F16 ? kF16 : kBf16; }

uint64_t fromFloatTo(Type dt, double x, const Inst& in) {
  const Round r = (Round)in.x[2];
  const unsigned flags = in.x[3];
  if (!isFloat(dt)) {
    if (x != x) return 0;
    const unsigned n = 8 * typeBytes(dt);
    double y = roundIntegral(x, r);
    if (isSigned(dt)) {
      const double lim = std::ldexp(1.0, (int)n - 1);
      int64_t v = y >= lim ? (int64_t)((1ull << (n - 1)) - 1) : y < -lim ? -(int64_t)(1ull << (n - 2)) * 2 : (int64_t)y;
      return (uint64_t)v;
    }
    const double lim = std::ldexp(1.0, (int)n);
    return y >= lim ? zeroExtend(~0ull, n / 8) : y <= 0 ? 0 : (uint64_t)y;
  }
  if (flags & Plan::ToIntegral) x = roundIntegral(x, r);
  if (flags & Plan::Sat) x = x != x ? 0.0 : x < 0 ? 0.0 : x > 1 ? 1.0 : x;
  if (flags & Plan::Relu && x < 0) x = 0;
  if (dt == Type::F64) return bits(x);
  uint32_t code =
      narrowFromDouble(x, format(dt), (flags & Plan::ToIntegral) ? Round::Nearest : r, flags & Plan::SatFinite);
  if (flags & Plan::Relu && code == (1u << format(dt).signBit)) code = 0;
  if (flags & Plan::Ftz && dt == Type::F32) code = bits(flush(f32(code)));
  return code;
}
uint64_t fromIntTo(Type dt, uint64_t v, bool sourceSigned, const Inst& in) {
  bool negative = sourceSigned && (int64_t)v < 0;
  uint64_t mag = negative ? 0 - v : v;
  if (isFloat(dt)) {
    const Round r = (Round)in.x[2];
    if (dt == Type::F64) {
      if (mag == 0) return 0;
      uint64_t code =
          roundMagnitude(mag, 0, false, 52, -1022, r, (r == Round::Up && !negative) || (r == Round::Down && negative));
      double x = bitsAs<double>(code | (negative ? 1ull << 63 : 0));
      return bits(in.x[3] & Plan::Sat ? std::clamp(x, 0.0, 1.0) : x);
    }
    uint32_t code = narrowFrom(mag, 0, false, negative, false, false, format(dt), r, false);
    if (in.x[3] & Plan::Sat && dt == Type::F32) code = bits(std::clamp(f32(code), 0.0f, 1.0f));
    return code;
  }
  if (in.x[3] & Plan::Sat) {
    const unsigned n = 8 * typeBytes(dt);
    if (isSigned(dt)) {
      int64_t lo = -(int64_t)(1ull << (n - 2)) * 2, hi = (int64_t)((1ull << (n - 1)) - 1);
      if (sourceSigned) return (uint64_t)std::clamp((int64_t)v, lo, hi);
      return std::min(v, (uint64_t)hi);
    }
    if (negative) return 0;
    return n == 64 ? v : std::min<uint64_t>(v, (1ull << n) - 1);
  }
  return v;
}

void convert(Warp& w, const Inst& in, uint32_t m) {
  const Type dt = (Type)in.x[0], st = (Type)in.x[1];
  const unsigned sb = typeBytes(st), db = typeBytes(dt);
  uint64_t v[kLanes];
  loadLanes(w, in.a, in.x[5], v);
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!((m >> i) & 1)) continue;
    uint64_t r;
    if (isFloat(st)) {
      if (in.x[3] & Plan::Ftz && st == Type::F32) v[i] = bits(flush(f32((uint32_t)v[i])));
      double x = toDouble(st, v[i]);
      r = fromFloatTo(dt, x, in);
    } else {
      r = fromIntTo(dt, isSigned(st) ? (uint64_t)signExtend(v[i], sb) : zeroExtend(v[i], sb), isSigned(st), in);
    }
    v[i] = isFloat(dt) ? r : isSigned(dt) ? (uint64_t)signExtend(r, db) : zeroExtend(r, db);
  }
  putLanes(w, in.d, in.x[4], v, m);
  w.setValid(in.d, m, w.validOf(in.a));
}

// ---- two floats into one register: x[2] rounding, x[3] flags, x[0] kind
enum Pack { PackF16, PackBf16, PackE4m3, PackE5m2 };
template <int K>
inline uint32_t narrowOne(float x, const Inst& in) {
  const unsigned flags = in.x[3];
  if (flags & Plan::Relu && x < 0) x = 0;
  uint32_t r;
  const Round mode = (Round)in.x[2];
  if (K == PackBf16 && mode == Round::Nearest && !(flags & Plan::SatFinite))
    r = toBf16(x);
  else
    r = narrowFromFloat(x,
                        K == PackF16    ? kF16
                        : K == PackBf16 ? kBf16
                        : K == PackE4m3 ? kE4m3
                                        : kE5m2,
                        mode, flags & Plan::SatFinite);
  if (flags & Plan::Relu && r == (K < PackE4m3 ? 0x8000u : 0x80u)) r = 0;
  return r;
}
template <int K, class D>
struct Pack2 {
  D operator()(const Inst& in, float hi, float lo) const {
    return (D)(narrowOne<K>(hi, in) << (4 * sizeof(D)) | narrowOne<K>(lo, in));
  }
};
template <int K>
struct PackFromF16x2 {
  uint16_t operator()(const Inst& in, uint32_t v) const {
    return (uint16_t)(narrowOne<K>(fromF16((uint16_t)(v >> 16)), in) << 8 | narrowOne<K>(fromF16((uint16_t)v), in));
  }
};
template <int K>
struct UnpackFp8 {
  uint32_t operator()(const Inst& in, uint16_t v) const {
    auto h = [&](uint32_t c) -> uint32_t {
      float f = (K == PackE4m3 ? kE4m3Table : kE5m2Table)[c];
      uint32_t r = toF16(f);
      if (in.x[3] & Plan::Relu && (r & 0x8000) && f == f) r = 0;
      return r;
    };
    return h(v >> 8) << 16 | h(v & 0xff);
  }
};
struct Tf32 {
  uint32_t operator()(const Inst& in, float x) const {
    constexpr Narrow kTf32{10, -126, 0xffu << 10, (0xffu << 10) - 1, 0x3ffff, 18};
    if (in.x[3] & Plan::Relu && x < 0) x = 0;
    uint32_t c = narrowFromFloat(x, kTf32, (Round)in.x[2], in.x[3] & Plan::SatFinite);
    if (x != x) return kNan32;
    if (in.x[3] & Plan::Relu && c == 1u << 18) c = 0;
    return (c & (1u << 18) ? 0x80000000u : 0) | (c & 0x3ffff) << 13;
  }
};
// Pack two saturated integers into the low bits over c shifted up.
void cvtPack(Warp& w, const Inst& in, uint32_t m) {
  const Type dt = (Type)in.x[0];
  const unsigned n = 8 * typeBytes(dt);
  uint32_t r[kLanes];
  Inst sat = in;
  sat.x[3] = Plan::Sat;
  for (unsigned i = 0; i < kLanes; ++i) {
    uint64_t a = (uint64_t)(int64_t)(int32_t)lane32(w, in.a, i), b = (uint64_t)(int64_t)(int32_t)lane32(w, in.b, i);
    uint32_t hi = (uint32_t)zeroExtend(fromIntTo(dt, a, true, sat), n / 8),
             lo = (uint32_t)zeroExtend(fromIntTo(dt, b, true, sat), n / 8);
    r[i] = (uint32_t)((in.x[1] ? (uint64_t)lane32(w, in.c, i) << (2 * n) : 0) | hi << n | lo);
  }
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a) & w.validOf(in.b) & w.validOf(in.c));
}

LANE(float, Bf16ToF32, (uint16_t h)) { return fromBf16(h); }
LANE(float, F16ToF32, (uint16_t h)) { return fromF16(h); }
LANE(float, I32ToF32, (int32_t a)) { return (float)a; }
LANE(float, U32ToF32, (uint32_t a)) { return (float)a; }
LANE(uint16_t, F32ToBf16, (float a)) { return toBf16(a); }
LANE(double, F32ToF64, (float a)) { return a; }
TYPED(T, Same, (T a)) { return a; }

Handler fastPath(Type dt, Type st, unsigned dreg, unsigned sreg, Round r, unsigned flags, bool integral) {
  if (flags || integral) return nullptr;
  if (dt == Type::F32 && st == Type::F16) return lanes<F16ToF32>();
  if (dt == Type::F32 && (st == Type::S32) && r == Round::Nearest) return lanes<I32ToF32>();
  if (dt == Type::F32 && (st == Type::U32) && r == Round::Nearest) return lanes<U32ToF32>();
  if (dt == Type::BF16 && st == Type::F32 && r == Round::Nearest) return lanes<F32ToBf16>();
  if (dt == Type::F64 && st == Type::F32) return lanes<F32ToF64>();
  if (dt == Type::U64 && st == Type::U32 && sreg == 4) return lanewise<Same<uint64_t>, uint64_t, uint32_t>;
  if ((dt == Type::S64 || dt == Type::U64) && st == Type::S32 && sreg == 4)
    return lanewise<Same<int64_t>, int64_t, int32_t>;
  if ((dt == Type::U32 || dt == Type::S32) && dreg == 4 && sreg == 8 && typeBytes(st) == 8 && !isFloat(st))
    return lanewise<Same<uint64_t>, uint32_t, uint64_t>;
  if ((dt == Type::U16 || dt == Type::S16) && dreg == 2 && sreg == 4 && typeBytes(st) == 4 && !isFloat(st))
    return lanewise<Same<uint32_t>, uint16_t, uint32_t>;
  if (dt == Type::U32 && dreg == 4 && st == Type::U16 && sreg == 2) return lanewise<Same<uint32_t>, uint32_t, uint16_t>;
  if ((dt == Type::S32 || dt == Type::U32) && dreg == 4 && st == Type::S16 && sreg == 2)
    return lanewise<Same<int32_t>, int32_t, int16_t>;
  return nullptr;
}

void decodeCvt(Dec& d) {
  if (d.take("pack")) {
    d.take("sat");
    Type dt = d.needType();
    d.needType();
    bool withC = d.takeType() == Type::B32;
    d.wantArgs(withC ? 4 : 3, withC ? 4 : 3);
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, Type::S32);
    d.out.b = d.src(2, Type::S32);
    if (withC) d.out.c = d.src(3, Type::B32);
    d.out.x[0] = (uint8_t)dt;
    d.out.x[1] = withC;
    d.out.fn = cvtPack;
    return;
  }
  int irnd = d.takeOneOf({"rni", "rzi", "rmi", "rpi"});
  int frnd = d.takeOneOf({"rn", "rz", "rm", "rp", "rna"});
  unsigned flags = (d.take("ftz") ? Plan::Ftz : 0) | (d.take("sat") ? Plan::Sat : 0) |
                   (d.take("satfinite") ? Plan::SatFinite : 0) | (d.take("relu") ? Plan::Relu : 0);
  Type dt = d.needType(), st = d.needType();
  const int rnd = std::max(0, irnd >= 0 ? irnd : frnd);
  const Round modes[] = {Round::Nearest, Round::Zero, Round::Down, Round::Up, Round::NearestAway};
  d.out.x[2] = (uint8_t)modes[rnd];
  d.out.x[3] = (uint8_t)flags;
  if (dt == Type::TF32) {
    setOperands(d, Type::B32, Type::F32);
    d.out.fn = lanes<Tf32>();
    return;
  }
  const bool fp8Dst = dt == Type::E4M3x2 || dt == Type::E5M2x2, fp8Src = st == Type::E4M3x2 || st == Type::E5M2x2;
  if (fp8Dst && !(flags & Plan::SatFinite)) d.fail(".satfinite is required");
  if (d.argc() == 3) {
    if (st != Type::F32) d.fail("only f32 pairs can be packed");
    const bool half = dt == Type::F16x2 || dt == Type::BF16x2;
    if (!half && !fp8Dst) d.fail("this packed type is not supported");
    d.out.d = d.dst(0, half ? 4 : 2);
    d.out.a = d.src(1, Type::F32);
    d.out.b = d.src(2, Type::F32);
    d.out.fn = dt == Type::F16x2    ? lanes<Pack2<PackF16, uint32_t>>()
               : dt == Type::BF16x2 ? lanes<Pack2<PackBf16, uint32_t>>()
               : dt == Type::E4M3x2 ? lanes<Pack2<PackE4m3, uint16_t>>()
                                    : lanes<Pack2<PackE5m2, uint16_t>>();
    return;
  }
  d.wantArgs(2, 2);
  if (fp8Dst) {
    if (st != Type::F16x2) d.fail("sm_90 converts only f32 pairs and f16x2 to fp8");
    d.out.d = d.dst(0, 2);
    d.out.a = d.src(1, Type::B32);
    d.out.fn = dt == Type::E4M3x2 ? lanes<PackFromF16x2<PackE4m3>>() : lanes<PackFromF16x2<PackE5m2>>();
    return;
  }
  if (fp8Src) {
    if (dt != Type::F16x2) d.fail("sm_90 converts fp8 only to f16x2");
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, Type::B16);
    d.out.fn = st == Type::E4M3x2 ? lanes<UnpackFp8<PackE4m3>>() : lanes<UnpackFp8<PackE5m2>>();
    return;
  }
  if (typeBytes(dt) > 8 || typeBytes(st) > 8 || dt == Type::F16x2 || dt == Type::BF16x2 || st == Type::F16x2 ||
      st == Type::BF16x2)
    return;
  unsigned sreg, dreg = d.regBytes(d.arg(0));
  d.out.d = d.dst(0, 0);
  d.out.a = d.srcWide(d.arg(1), st, &sreg);
  if (dreg < typeBytes(dt) || sreg < typeBytes(st)) d.fail("a register is narrower than its type");
  const bool integral = isFloat(dt) && isFloat(st) && irnd >= 0;
  if (integral) flags |= Plan::ToIntegral;
  if (!isFloat(dt) && isFloat(st) && irnd < 0) d.fail("an integer rounding mode is required");
  d.out.x[0] = (uint8_t)dt;
  d.out.x[1] = (uint8_t)st;
  d.out.x[3] = (uint8_t)flags;
  d.out.x[4] = (uint8_t)dreg;
  d.out.x[5] = (uint8_t)sreg;
  d.out.fn = fastPath(dt, st, dreg, sreg, modes[rnd], flags, integral);
  if (dt == Type::F32 && st == Type::BF16 && flags == 0) d.out.fn = lanes<Bf16ToF32>();
  if (!d.out.fn) d.out.fn = convert;
}

}  // namespace

static void addConvertOps(OpTable& t) { t["cvt"] = decodeCvt; }

static const bool kAdded = (addConvertOps(opTable()), true);
}  // namespace ptxsim
