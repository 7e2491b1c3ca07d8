// Counts where quant/divide.h and IEEE division differ; prints cases, mismatches and the first one.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#include "quant/divide.h"

namespace {

int64_t cases = 0, mismatches = 0;

uint32_t bits(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  return value;
}

float from_bits(uint32_t value) {
  float x;
  std::memcpy(&x, &value, 4);
  return x;
}

void differ(const char* what, float x, float divisor, float got, float wanted) {
  if (mismatches++ == 0) std::printf("%s: %a / %a: got %a, wanted %a\n", what, x, divisor, got, wanted);
}

float scale_of(float amax) {
  const float floor = amax > 1e-4f ? amax : 1e-4f;
  const float got = dsv3::divide(floor, 448.0f, 1.0f / 448.0f), wanted = floor / 448.0f;
  ++cases;
  if (bits(got) != bits(wanted)) differ("scale", floor, 448.0f, got, wanted);
  return wanted;
}

// As E4M3 sees it: the same bits, or two numbers of the same sign that are both far below its smallest code's half.
void check(float x, float scale, float reciprocal) {
  const float got = dsv3::divide(x, scale, reciprocal), wanted = x / scale;
  ++cases;
  if (bits(got) == bits(wanted)) return;
  const bool both_vanish = std::fabs(got) < 0x1p-22f && std::fabs(wanted) < 0x1p-23f;
  if (!(both_vanish && std::signbit(got) == std::signbit(wanted))) differ("code", x, scale, got, wanted);
}

// Every mantissa of `mantissa_bits` for amax in a few binades, against every such x up to it in the binades that
// matter.
void short_formats(int mantissa_bits, int below) {
  const uint32_t step = 1u << (23 - mantissa_bits), count = 1u << mantissa_bits;
  for (const int exponent : {-13, 0, 7, 120}) {
    for (uint32_t m = 0; m < count; ++m) {
      const float amax = from_bits(static_cast<uint32_t>(exponent + 127) << 23 | m * step);
      const float scale = scale_of(amax), reciprocal = 1.0f / scale;
      for (uint32_t e = static_cast<uint32_t>(exponent + 127 - below); e <= static_cast<uint32_t>(exponent + 127);
           ++e) {
        for (uint32_t n = 0; n < count; ++n) check(from_bits(e << 23 | n * step), scale, reciprocal);
      }
    }
  }
}

}  // namespace

int main() {
  short_formats(7, 18);  // bf16
  short_formats(10, 1);  // f16: the two binades below amax; the quotient's mantissa does not depend on the binade
  std::mt19937_64 random(1);
  for (int i = 0; i < 200000; ++i) {
    // Any float32 amax, and x next to the quotients where E4M3 changes its mind.
    const float amax = from_bits(static_cast<uint32_t>(random() % 0x7F800000));
    const float scale = scale_of(amax), reciprocal = 1.0f / scale;
    for (int j = 0; j < 4; ++j) {
      const float tie =
          std::ldexp(static_cast<float>(2 * (8 + random() % 8) + 1), static_cast<int>(random() % 15) - 10);
      const uint32_t near = bits(tie * scale);
      for (int k = -2; k <= 2; ++k) {
        const float x = from_bits(near + static_cast<uint32_t>(k));
        if (x <= amax) check(k % 2 ? -x : x, scale, reciprocal);
      }
    }
    const float x = from_bits(static_cast<uint32_t>(random()));
    if (std::fabs(x) <= amax) check(x, scale, reciprocal);
    check(0.0f, scale, reciprocal);
    check(-0.0f, scale, reciprocal);
    check(from_bits(1), scale, reciprocal);
    check(-from_bits(0x007FFFFF), scale, reciprocal);
  }
  std::printf("%lld cases, %lld mismatches\n", static_cast<long long>(cases), static_cast<long long>(mismatches));
  return mismatches != 0;
}
