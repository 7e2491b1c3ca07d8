// Narrow floats: bit-exact conversions to and from float32, in plain integer code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptxsim {

enum class Round : uint8_t { Nearest, Zero, Down, Up, NearestAway };

template <class T, class U>
inline T bitsAs(U u) {
  static_assert(sizeof(T) == sizeof(U), "same size");
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}
inline float f32(uint32_t b) { return bitsAs<float>(b); }
inline uint32_t bits(float f) { return bitsAs<uint32_t>(f); }
inline uint64_t bits(double f) { return bitsAs<uint64_t>(f); }
inline bool isNan32(uint32_t b) { return (b & 0x7fffffffu) > 0x7f800000u; }
constexpr uint32_t kNan32 = 0x7fffffffu;
inline float canonical(float f) { return f != f ? f32(kNan32) : f; }
inline double canonical(double f) { return f; }
inline float flush(float f) {
  uint32_t b = bits(f);
  return (b & 0x7f800000u) == 0 ? f32(b & 0x80000000u) : f;
}

// Rounds a finite magnitude m * 2^e (m != 0) to a format of `mant` stored mantissa bits with smallest normal exponent
// emin. Returns the code without sign; codes run on into the exponent, so the caller clamps what exceeds its largest.
// `up`: directed rounding goes away from zero.
inline uint64_t roundMagnitude(uint64_t m, int e, int mant, int emin, Round mode, bool up) {
  int top = 63 - __builtin_clzll(m);  // value exponent is e + top
  int exponent = e + top;
  int quantum = (exponent < emin ? emin : exponent) - mant;  // weight of the last kept bit
  int shift = quantum - e;                                   // bits of m below it
  uint64_t kept = shift <= 0 ? m << -shift : shift < 64 ? m >> shift : 0;
  if (shift > 0) {
    const bool half = shift <= 64 && m >> (shift - 1) & 1;
    const bool rest = shift > 64 || m & ((1ull << (shift - 1)) - 1);
    if (mode == Round::Nearest)
      kept += half && (rest || kept & 1);
    else if (mode == Round::NearestAway)
      kept += half;
    else if (mode != Round::Zero)
      kept += up && (half || rest);
  }
  if (exponent < emin) return kept;  // subnormal, or the smallest normal after a carry
  return ((uint64_t)(exponent - emin + 1) << mant) + (kept - (1ull << mant));
}

struct Narrow {  // a binary interchange format, or one of the two fp8
  int mant, emin;
  uint64_t inf, maxFinite, nan;  // codes without sign; inf == 0: the format has none
  int signBit;
};
constexpr Narrow kF16{10, -14, 0x7c00, 0x7bff, 0x7fff, 15};
constexpr Narrow kBf16{7, -126, 0x7f80, 0x7f7f, 0x7fff, 15};
constexpr Narrow kE4m3{3, -6, 0, 0x7e, 0x7f, 7};
constexpr Narrow kE5m2{2, -14, 0x7c, 0x7b, 0x7f, 7};

// `saturate`: overflow and infinity go to the largest finite value (cvt .satfinite).
inline uint64_t narrowFrom(uint64_t m, int e, bool negative, bool infinite, bool nan, const Narrow& f, Round mode,
                           bool saturate) {
  if (nan) return f.nan;
  const uint64_t sign = (uint64_t)negative << f.signBit;
  if (infinite) return sign | (saturate ? f.maxFinite : f.inf ? f.inf : f.nan);
  if (m == 0) return sign;
  bool up = (mode == Round::Up && !negative) || (mode == Round::Down && negative);
  uint64_t code = roundMagnitude(m, e, f.mant, f.emin, mode, up);
  if (code > f.maxFinite) {
    if (saturate) return sign | f.maxFinite;
    bool toInf = mode == Round::Nearest || mode == Round::NearestAway || up;
    return sign | (toInf ? (f.inf ? f.inf : f.nan) : f.maxFinite);
  }
  return sign | code;
}
template <class F>
inline uint64_t narrowFrom(F x, const Narrow& f, Round mode = Round::Nearest, bool saturate = false) {
  constexpr int mant = sizeof(F) == 4 ? 23 : 52, most = sizeof(F) == 4 ? 0xff : 0x7ff;
  const uint64_t b = bits(x), one = 1ull << mant, frac = b & (one - 1);
  const int ex = (int)(b >> mant) & most;
  return narrowFrom(ex ? frac | one : frac, (ex ? ex : 1) - most / 2 - mant, std::signbit(x), ex == most && !frac,
                    ex == most && frac, f, mode, saturate);
}
// The smaller or the larger of two floats of 16 bits: -0 is below 0, and one NaN loses.
inline uint16_t minOrMax(uint16_t a, uint16_t b, const Narrow& f, bool smaller) {
  auto isNan = [&](uint16_t h) { return (h & 0x7fffu) > f.inf; };
  auto rank = [](uint16_t h) { return h & 0x8000 ? ~(h & 0x7fff) : h; };
  if (isNan(a)) return isNan(b) ? (uint16_t)f.nan : b;
  return isNan(b) || (rank(a) < rank(b)) == smaller ? a : b;
}
inline float widen(uint32_t code, const Narrow& f) {
  uint32_t sign = (code >> f.signBit) & 1, mag = code & ((1u << f.signBit) - 1);
  if (f.inf ? mag > f.inf : mag >= f.nan) return f32(kNan32);
  if (f.inf && mag == f.inf) return f32(sign << 31 | 0x7f800000u);
  int ex = (int)(mag >> f.mant);
  uint32_t frac = mag & ((1u << f.mant) - 1);
  float v = ex ? std::ldexp((float)(frac | 1u << f.mant), ex - 1 + f.emin - f.mant)
               : std::ldexp((float)frac, f.emin - f.mant);
  return sign ? -v : v;
}

inline float fromBf16(uint16_t h) { return f32((uint32_t)h << 16); }
inline uint16_t toBf16(float x) {  // nearest even; NaN becomes 0x7fff
  uint32_t b = bits(x);
  if (isNan32(b)) return 0x7fff;
  return (uint16_t)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}
extern const float* const kHalfTable;  // 65536 values
extern const float* const kE4m3Table;  // 256
extern const float* const kE5m2Table;
inline float fromF16(uint16_t h) { return kHalfTable[h]; }
inline uint16_t toF16(float x) { return (uint16_t)narrowFrom(x, kF16); }

}  // namespace ptxsim
