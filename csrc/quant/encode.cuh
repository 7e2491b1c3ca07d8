// Values in, scales and codes out, 16 bytes of values a lane: what the quantisers share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/convert.cuh"
#include "quant/divide.h"

namespace dsv3 {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3MaxReciprocal = 1.0f / 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr uint32_t kNan = 0x7FC00000;  // the NaN that PyTorch writes; instructions would make 0x7FFFFFFF

// Element i of consecutive ones in 32-bit words.
__device__ __forceinline__ float element(const uint32_t* words, int i, float) { return __uint_as_float(words[i]); }
__device__ __forceinline__ float element(const uint32_t* words, int i, __nv_bfloat16) {
  return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
}
__device__ __forceinline__ float element(const uint32_t* words, int i, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16))));
}

// Scale of a block whose largest magnitude is amax: a positive normal number or NaN.
__device__ __forceinline__ float scale_of(float amax, bool pow2) {
  float scale = divide(fmaxf(amax, kAmaxFloor), kE4m3Max, kE4m3MaxReciprocal);
  // Carrying a mantissa that is not zero into the exponent rounds up to a power of two.
  if (pow2) scale = __uint_as_float((__float_as_uint(scale) + 0x7FFFFF) & ~0x7FFFFFu);
  return amax <= 3.40282347e38f ? scale : __uint_as_float(kNan);
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// 16 bytes from x on, of which the first `left` elements are there (none when it is not positive); the others are zero.
// With kVectors they are there all or not at all, and x is aligned.
template <bool kVectors, class B>
__device__ __forceinline__ uint4 load(const B* x, int64_t left) {
  if constexpr (kVectors) {
    return left > 0 ? __ldg(reinterpret_cast<const uint4*>(x)) : uint4{};
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(B)); ++i) {
      const int bit = i * static_cast<int>(sizeof(B)) * 8;
      if (i < left) words[bit / 32] |= static_cast<uint32_t>(x[i]) << (bit % 32);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The numbers that 16 bytes hold.
template <class T>
__device__ __forceinline__ void unpack(const uint4& loaded, float (&values)[16 / sizeof(T)]) {
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) values[i] = element(words, i, T{});
}

// The codes of kCount values, of which the first `left` belong at q.
template <bool kVectors, int kCount>
__device__ __forceinline__ void store(uint8_t* q, const float (&values)[kCount], float scale, float reciprocal,
                                      int64_t left) {
  static_assert(kCount == 4 || kCount == 8, "16 bytes of float32, or of bf16 and f16");
  uint32_t codes[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    codes[i] = ptx::cvt_rn_satfinite_e4m3x4_f32(
        divide(values[4 * i], scale, reciprocal), divide(values[4 * i + 1], scale, reciprocal),
        divide(values[4 * i + 2], scale, reciprocal), divide(values[4 * i + 3], scale, reciprocal));
  }
  if constexpr (kVectors && kCount == 8) {
    *reinterpret_cast<uint2*>(q) = make_uint2(codes[0], codes[1]);
  } else if constexpr (kVectors) {
    *reinterpret_cast<uint32_t*>(q) = codes[0];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) q[i] = static_cast<uint8_t>(codes[i / 4] >> (8 * (i % 4)));
    }
  }
}

// A row's codes and scales in 1x128 blocks.
struct EncodedRow {
  uint8_t* q;
  float* scale;
  int64_t scale_block_stride;
  int64_t columns;
  bool pow2;
};

// Quantises this lane's values, which begin at `column`. The lanes of a block are neighbours; whole warps call, with
// zeros beyond the row.
template <bool kVectors, int kCount>
__device__ __forceinline__ void encode(const EncodedRow& row, int64_t column, const float (&values)[kCount]) {
  constexpr int kLanes = 128 / kCount;  // of one block
  static_assert(kLanes == 16 || kLanes == 32, "a half or a whole warp: the shuffles below");
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) amax = ptx::max_nan_f32(amax, fabsf(values[i]));
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, distance));
  }
  const float scale = scale_of(amax, row.pow2);
  const float reciprocal = __frcp_rn(scale);
  if (column >= row.columns) return;
  if (threadIdx.x % kLanes == 0) row.scale[(column >> 7) * row.scale_block_stride] = scale;
  store<kVectors>(row.q + column, values, scale, reciprocal, row.columns - column);
}

}  // namespace dsv3
