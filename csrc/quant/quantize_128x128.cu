// quantize_128x128: q [N, K] e4m3 and scale [N/128, K/128] float32 of w [N, K] float32, bf16 or f16, or of a stack.
//
//   scale = max(amax of 128 x 128, 1e-4) / 448, NaN where amax is not finite (pow2: rounded up to a power of two)
//   q     = w / scale, rounded to nearest even and saturated; NaN is 0x7F
// Both quotients have the bits of IEEE float32 division (divide.h), so that every backend agrees in every bit.
//
// Roles     one CTA of 8 warps per block, which it holds in registers: 64 elements a thread. amax goes by shuffles
//           within a warp, then through 32 bytes of shared memory.
// Barriers  one __syncthreads, between the warps' maxima and the block's
// Budget    bytes per element: 2 + 1 (bf16, f16) or 4 + 1 (float32), each moved once; memory-bound as quantize_1x128
// Accesses  loads 16 bytes a lane, all issued before the first is used; stores 8 (4) bytes a lane: rows of 128 codes,
//           every sector whole. Matrices that are not aligned to such accesses take the scalar ones.
#include "quant/encode.cuh"
#include "quant/quantize_128x128_params.h"

namespace dsv3 {
namespace {

template <class T, bool kVectors>
__device__ __forceinline__ void quantize(const Quantize128x128Params& p) {
  constexpr int kVector = 16 / sizeof(T);                // elements of a lane and step
  constexpr int kLanes = 128 / kVector;                  // of one row
  constexpr int kRows = kQuantizeBlockThreads / kLanes;  // of all threads at once
  constexpr int kSteps = 128 / kRows;
  constexpr int kWarps = kQuantizeBlockThreads / 32;
  static_assert(kRows * kSteps == 128, "the threads cover the block in whole steps");

  const uint32_t block_column = blockIdx.x % p.column_blocks;
  const uint32_t block_row = blockIdx.x / p.column_blocks % p.row_blocks;
  const int64_t matrix = blockIdx.x / p.column_blocks / p.row_blocks;
  const int64_t first_row = static_cast<int64_t>(block_row) * 128 + threadIdx.x / kLanes;
  const int64_t column = static_cast<int64_t>(block_column) * 128 + threadIdx.x % kLanes * kVector;
  const Bits<T>* w = static_cast<const Bits<T>*>(p.w) + matrix * p.w_matrix_stride + column;
  uint8_t* q = p.q + matrix * p.rows * p.columns + column;

  uint4 loaded[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t row = first_row + step * kRows;
    loaded[step] = load<kVectors>(w + row * p.w_row_stride, row < p.rows ? p.columns - column : 0);
  }

  float values[kSteps][kVector];
  float amax = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    unpack<T>(loaded[step], values[step]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) amax = ptx::max_nan_f32(amax, fabsf(values[step][i]));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, distance));
  }
  __shared__ float maxima[kWarps];
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) amax = ptx::max_nan_f32(amax, maxima[warp]);

  const float scale = scale_of(amax, p.pow2_scale != 0);
  const float reciprocal = __frcp_rn(scale);
  if (threadIdx.x == 0) {
    p.scale[matrix * p.scale_matrix_stride + block_row * p.scale_row_stride + block_column * p.scale_column_stride] =
        scale;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t row = first_row + step * kRows;
    if (row < p.rows && column < p.columns) {
      store<kVectors>(q + row * p.columns, values[step], scale, reciprocal, p.columns - column);
    }
  }
}

template <class T>
__device__ __forceinline__ void quantize(const Quantize128x128Params& p) {
  if (p.vectors) {
    quantize<T, true>(p);
  } else {
    quantize<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeBlockThreads)
    quantize_128x128_f32(const __grid_constant__ dsv3::Quantize128x128Params p) {
  dsv3::quantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeBlockThreads)
    quantize_128x128_bf16(const __grid_constant__ dsv3::Quantize128x128Params p) {
  dsv3::quantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kQuantizeBlockThreads)
    quantize_128x128_f16(const __grid_constant__ dsv3::Quantize128x128Params p) {
  dsv3::quantize<__half>(p);
}
