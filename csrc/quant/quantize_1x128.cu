// quantize_1x128: q [T, K] e4m3 and scale [T, K/128] float32 of x [T, K] float32, bf16 or f16.
//
//   scale = max(amax of 128 columns, 1e-4) / 448, NaN where amax is not finite (pow2: rounded up to a power of two)
//   q     = x / scale, rounded to nearest even and saturated; NaN is 0x7F
// Both quotients have the bits of IEEE float32 division (divide.h), so eager, Triton and this agree in every bit.
//
// Roles     8 warps, one row each; no shared memory, no barrier. A warp goes along its row in kQuantizeSteps steps of
//           512 bytes, 16 a lane: the lanes of one block are neighbours (32 for float32, 16 for bf16 and f16), hold its
//           128 columns in registers and agree on amax by shuffles.
// Budget    bytes per element: 2 + 1 + 4/128 = 3.03 (bf16, f16), 5.03 (float32), each moved once. About 15
//           instructions per element (SASS); at 128 lanes per SM and cycle that is 8.5 elements, where memory at
//           3.35 TB/s, 132 SMs and 1.7 GHz delivers 4.9: memory-bound. (An IEEE division apiece would add two
//           instructions of the 16-lane special-function unit and about eight others, and would not be.)
// Accesses  loads 16 bytes a lane, 512 contiguous bytes a warp; stores 8 (4) bytes a lane, 256 (128) contiguous bytes a
//           warp: every sector whole. All loads of a warp are issued before the first is used: 64 bytes a lane in
//           flight. Rows that are not aligned to such accesses take the scalar ones, element by element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/convert.cuh"
#include "quant/divide.h"
#include "quant/quantize_1x128_params.h"

namespace dsv3 {
namespace {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3MaxReciprocal = 1.0f / 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr uint32_t kNan = 0x7FC00000;  // the NaN that PyTorch writes; instructions would make 0x7FFFFFFF

// Element i of consecutive ones in 32-bit words.
__device__ __forceinline__ float element(const uint32_t* words, int i, float) {
  return __uint_as_float(words[i]);
}
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

template <class T, bool kVectors>
__device__ __forceinline__ void quantize(const Quantize1x128Params& p) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  constexpr int kVector = 16 / sizeof(T);     // elements of a lane and step
  constexpr int kLanes = 128 / kVector;       // of one block
  constexpr int kStepColumns = 32 * kVector;  // of one warp and step
  static_assert(kLanes == 16 || kLanes == 32, "a block's lanes are a half or a whole warp: the shuffles below");
  static_assert(kStepColumns * kQuantizeSteps == quantize_columns(sizeof(T)), "the launcher's grid covers the row");

  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.chunks) * kQuantizeRows + threadIdx.x / 32;
  if (row >= p.rows) return;  // whole warps leave
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * quantize_columns(sizeof(T)) + lane * kVector;
  const Bits* x = static_cast<const Bits*>(p.x) + row * p.x_stride;
  uint8_t* q = p.q + row * p.columns;
  float* scales = p.scale + row * p.scale_row_stride;

  uint4 loaded[kQuantizeSteps] = {};  // what lies beyond the row counts as zeros
#pragma unroll
  for (int step = 0; step < kQuantizeSteps; ++step) {
    const int64_t column = first + step * kStepColumns;
    if constexpr (kVectors) {
      if (column < p.columns) loaded[step] = __ldg(reinterpret_cast<const uint4*>(x + column));
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int64_t bit = i * sizeof(T) * 8;
        if (column + i < p.columns) words[bit / 32] |= static_cast<uint32_t>(x[column + i]) << (bit % 32);
      }
      loaded[step] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

#pragma unroll
  for (int step = 0; step < kQuantizeSteps; ++step) {
    const int64_t column = first + step * kStepColumns;
    const uint32_t words[4] = {loaded[step].x, loaded[step].y, loaded[step].z, loaded[step].w};
    float values[kVector];
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = element(words, i, T{});
      amax = ptx::max_nan_f32(amax, fabsf(values[i]));
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, distance));
    }
    const float scale = scale_of(amax, p.pow2_scale != 0);
    const float reciprocal = __frcp_rn(scale);
    if (column >= p.columns) continue;
    if (lane % kLanes == 0) scales[(column >> 7) * p.scale_block_stride] = scale;

    uint32_t codes[kVector / 4];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = divide(values[i], scale, reciprocal);
#pragma unroll
    for (int i = 0; i < kVector / 4; ++i) {
      codes[i] =
          ptx::cvt_rn_satfinite_e4m3x4_f32(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
    if constexpr (kVectors && kVector == 8) {
      *reinterpret_cast<uint2*>(q + column) = make_uint2(codes[0], codes[1]);
    } else if constexpr (kVectors) {
      *reinterpret_cast<uint32_t*>(q + column) = codes[0];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < p.columns) q[column + i] = static_cast<uint8_t>(codes[i / 4] >> (8 * (i % 4)));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void quantize(const Quantize1x128Params& p) {
  if (p.vectors) {
    quantize<T, true>(p);
  } else {
    quantize<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeThreads)
    quantize_1x128_f32(const __grid_constant__ dsv3::Quantize1x128Params p) {
  dsv3::quantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeThreads)
    quantize_1x128_bf16(const __grid_constant__ dsv3::Quantize1x128Params p) {
  dsv3::quantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeThreads)
    quantize_1x128_f16(const __grid_constant__ dsv3::Quantize1x128Params p) {
  dsv3::quantize<__half>(p);
}
