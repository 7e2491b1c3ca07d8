// cvt (PTX ISA 9.7.9.21 and on). The general path takes every lane through an exact intermediate; the common pairs have
// their own.
#include "ops.h"

namespace ptxsim {
namespace {

// What all forms but pack may have, and where it is in Inst::x.
#define MODIFIERS "rni|rzi|rmi|rpi? rn|rz|rm|rp|rna? ftz? sat? satfinite? relu? "
enum { Integral, Rounding, Ftz, Sat, SatFinite, Relu, To, From };
Round mode(const Inst& in) {
  return (Round)std::max(0, std::max(in.x[Integral], in.x[Rounding]) - 1);  // both in the order of Round
}

constexpr Narrow kF64{52, -1022, 0x7ffull << 52, (0x7ffull << 52) - 1, ~0ull >> 1, 63};
constexpr Narrow kF32{23, -126, 0x7f800000u, 0x7f7fffffu, 0x7fffffffu, 31};
constexpr Narrow kTf32{10, -126, 0xffu << 10, (0xffu << 10) - 1, 0x3ffff, 18};
constexpr const Narrow& format(Type t) {
  if (t == Type::E4M3 || t == Type::E5M2) return t == Type::E4M3 ? kE4m3 : kE5m2;
  return t == Type::F64 ? kF64 : t == Type::F32 ? kF32 : t == Type::F16 ? kF16 : kBf16;
}
double roundIntegral(double x, Round r) {
  static double (*const byMode[])(double) = {::nearbyint, ::trunc, ::floor, ::ceil, ::round};
  return byMode[(int)r](x);
}
double toDouble(Type t, uint64_t v) {
  if (t == Type::F64) return bitsAs<double>(v);
  return t == Type::F32 ? f32((uint32_t)v) : t == Type::F16 ? fromF16((uint16_t)v) : fromBf16((uint16_t)v);
}
uint64_t extend(uint64_t v, Type t) {  // an integer of this type to 64 bits
  const unsigned drop = 64 - 8 * typeBytes(t);
  return isSigned(t) ? (uint64_t)((int64_t)(v << drop) >> drop) : v << drop >> drop;
}
uint64_t largest(Type t) { return ~0ull >> (64 - 8 * typeBytes(t) + isSigned(t)); }
int64_t smallest(Type t) { return isSigned(t) ? -(int64_t)largest(t) - 1 : 0; }

uint64_t fromFloatTo(Type t, double x, const Inst& in) {
  const Round r = mode(in);
  if (!isFloat(t)) {
    if (x != x) return 0;
    const double y = roundIntegral(x, r);
    if (y >= std::ldexp(1.0, (int)(8 * typeBytes(t)) - isSigned(t))) return largest(t);
    if (y < (double)smallest(t)) return (uint64_t)smallest(t);
    return isSigned(t) ? (uint64_t)(int64_t)y : (uint64_t)y;
  }
  if (in.x[Integral]) x = roundIntegral(x, r);
  if (in.x[Sat]) x = x != x ? 0.0 : std::clamp(x, 0.0, 1.0);
  if (in.x[Relu] && x < 0) x = 0;
  if (t == Type::F64) return bits(x);
  uint64_t code = narrowFrom(x, format(t), in.x[Integral] ? Round::Nearest : r, in.x[SatFinite]);
  if (in.x[Relu] && code == 1u << format(t).signBit) code = 0;
  return in.x[Ftz] && t == Type::F32 ? bits(flush(f32((uint32_t)code))) : code;
}
// `negative`: v is below zero as a signed number.
uint64_t fromIntTo(Type t, uint64_t v, bool negative, bool saturate, Round r) {
  if (isFloat(t)) {
    const uint64_t code = narrowFrom(negative ? 0 - v : v, 0, negative, false, false, format(t), r, false);
    if (saturate && t == Type::F32) return bits(std::clamp(f32((uint32_t)code), 0.0f, 1.0f));
    return saturate && t == Type::F64 ? bits(std::clamp(bitsAs<double>(code), 0.0, 1.0)) : code;
  }
  if (!saturate) return v;
  return negative ? (uint64_t)std::max((int64_t)v, smallest(t)) : std::min(v, largest(t));
}

void convert(Warp& w, const Inst& in, uint32_t m) {  // bytes, vec: bytes of the registers of d and a
  const Type to = (Type)in.x[To], from = (Type)in.x[From];
  for (int i : lanesOf(m)) {
    uint64_t v = laneBits(w, in.a, in.vec, i);
    if (isFloat(from)) {
      if (in.x[Ftz] && from == Type::F32) v = bits(flush(f32((uint32_t)v)));
      v = fromFloatTo(to, toDouble(from, v), in);
    } else {
      v = extend(v, from);
      v = fromIntTo(to, v, isSigned(from) && (int64_t)v < 0, in.x[Sat], mode(in));
    }
    setLaneBits(w, in.d, in.bytes, i, isFloat(to) ? v : extend(v, to));
  }
  w.setValid(in.d, m, w.validOf(in.a));
}
TYPED(T, Same, (T a)) { return a; }
void decodeConvert(Dec& d) {
  const Type to = d.types[0], from = d.types[1];
  for (Type t : d.types)
    if (typeBytes(t) > 8 || t == Type::F16x2 || t == Type::BF16x2 || t == Type::TF32 || t > Type::F64) return;
  d.wantArgs(2);
  unsigned sreg, dreg = d.regBytes(d.arg(0));
  d.out.d = d.dst(0, 0);
  d.out.a = d.srcWide(d.arg(1), from, &sreg);
  if (dreg < typeBytes(to) || sreg < typeBytes(from)) d.fail("a register is narrower than its type");
  if (!isFloat(to) && isFloat(from) && !d.out.x[Integral]) d.fail("an integer rounding mode is required");
  if (!isFloat(from)) d.out.x[Rounding] = std::max(d.out.x[Integral], d.out.x[Rounding]), d.out.x[Integral] = 0;
  d.out.x[To] = (uint8_t)to;
  d.out.x[From] = (uint8_t)from;
  d.out.bytes = (uint8_t)dreg;
  d.out.vec = (uint8_t)sreg;
  d.out.fn = convert;
  // Integers that fill their registers: the source's type says how it is extended.
  if (isFloat(to) || d.out.x[Sat] || dreg != typeBytes(to) || sreg != typeBytes(from)) return;
  if (Handler h = ofType<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(from, [&](auto t) {
        using T = decltype(t);
        return dreg == 2   ? lanewise<Same<T>, uint16_t, T>
               : dreg == 4 ? lanewise<Same<T>, uint32_t, T>
                           : lanewise<Same<T>, uint64_t, T>;
      }))
    d.out.fn = h;
}

// ---- narrow floats, in pairs
template <Type K>
inline uint32_t narrowed(const Inst& in, float x) {
  constexpr Narrow f = format(K);
  if (in.x[Relu] && x < 0) x = 0;
  const Round r = mode(in);
  const uint32_t code =
      K == Type::BF16 && r == Round::Nearest && !in.x[SatFinite] ? toBf16(x) : narrowFrom(x, f, r, in.x[SatFinite]);
  return in.x[Relu] && code == 1u << f.signBit ? 0 : code;
}
template <Type K, class D>
struct Pack {
  D operator()(const Inst& in, float hi, float lo) const {
    return (D)(narrowed<K>(in, hi) << (4 * sizeof(D)) | narrowed<K>(in, lo));
  }
};
template <Type K>
struct FromHalves {
  uint16_t operator()(const Inst& in, uint32_t v) const {
    return Pack<K, uint16_t>()(in, fromF16((uint16_t)(v >> 16)), fromF16((uint16_t)v));
  }
};
template <Type K>
struct ToHalves {
  uint32_t operator()(const Inst& in, uint16_t v) const {
    auto half = [&](uint32_t c) -> uint32_t {
      const float f = (K == Type::E4M3 ? kE4m3Table : kE5m2Table)[c];
      return in.x[Relu] && std::signbit(f) && f == f ? 0 : toF16(f);
    };
    return half(v >> 8) << 16 | half(v & 0xff);
  }
};
template <class F>
void saturating(Dec& d) {
  if (!d.out.x[SatFinite]) d.fail(".satfinite is required");
  d.out.fn = lanes<F>();
}
LANE(uint32_t, ToTf32, (const Inst& in, float x)) {
  if (in.x[Relu] && x < 0) x = 0;
  const uint32_t c = narrowFrom(x, kTf32, mode(in), in.x[SatFinite]);
  if (x != x) return kNan32;
  if (in.x[Relu] && c == 1u << 18) return 0;
  return (c >> 18) << 31 | (c & 0x3ffff) << 13;
}
// cvt.pack: two saturated integers in the low bits, over c shifted up if there is one.
LANE(uint32_t, PackIntegers, (const Inst& in, int32_t a, int32_t b, uint32_t c)) {
  const unsigned n = 8 * in.bytes;
  auto part = [&](int32_t v) {
    return fromIntTo(in.type, (uint64_t)(int64_t)v, v < 0, true, Round::Zero) & (~0ull >> (64 - n));
  };
  return (uint32_t)((in.c ? (uint64_t)c << (2 * n) : 0) | part(a) << n | part(b));
}

LANE(float, Bf16ToF32, (uint16_t h)) { return fromBf16(h); }
LANE(float, F16ToF32, (uint16_t h)) { return fromF16(h); }
LANE(uint16_t, F32ToBf16, (float a)) { return toBf16(a); }

const Forms kForms = {
    {"cvt", "pack (sat) type type b32", "d:b32 a:s32 b:s32 c:b32", lanes<PackIntegers>()},
    {"cvt", "pack (sat) type type", "d:b32 a:s32 b:s32", lanes<PackIntegers>()},
    {"cvt", "f32 f16", "d a:1", lanes<F16ToF32>()},
    {"cvt", "(rn|rz|rm|rp) f32 bf16", "d a:1", lanes<Bf16ToF32>()},
    {"cvt", "rn f32 s32", "d a:1", lanewise<Same<int32_t>, float, int32_t>},
    {"cvt", "rn f32 u32", "d a:1", lanewise<Same<uint32_t>, float, uint32_t>},
    {"cvt", "rn bf16 f32", "d a:1", lanes<F32ToBf16>()},
    {"cvt", "f64 f32", "d a:1", lanewise<Same<float>, double, float>},
    {"cvt", MODIFIERS "tf32 f32", "d:b32 a:1", lanes<ToTf32>()},
    {"cvt", MODIFIERS "f16x2 f32", "d a:1 b:1", lanes<Pack<Type::F16, uint32_t>>()},
    {"cvt", MODIFIERS "bf16x2 f32", "d a:1 b:1", lanes<Pack<Type::BF16, uint32_t>>()},
    {"cvt", MODIFIERS "e4m3x2 f32", "d a:1 b:1", saturating<Pack<Type::E4M3, uint16_t>>},
    {"cvt", MODIFIERS "e5m2x2 f32", "d a:1 b:1", saturating<Pack<Type::E5M2, uint16_t>>},
    {"cvt", MODIFIERS "e4m3x2 f16x2", "d a:1", saturating<FromHalves<Type::E4M3>>},
    {"cvt", MODIFIERS "e5m2x2 f16x2", "d a:1", saturating<FromHalves<Type::E5M2>>},
    {"cvt", MODIFIERS "f16x2 e4m3x2", "d a:1", lanes<ToHalves<Type::E4M3>>()},
    {"cvt", MODIFIERS "f16x2 e5m2x2", "d a:1", lanes<ToHalves<Type::E5M2>>()},
    {"cvt", MODIFIERS "type type", nullptr, decodeConvert},
};

}  // namespace
}  // namespace ptxsim
