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
#include "quant/encode.cuh"
#include "quant/quantize_1x128_params.h"

namespace dsv3 {
namespace {

template <class T, bool kVectors>
__device__ __forceinline__ void quantize(const Quantize1x128Params& p) {
  constexpr int kVector = 16 / sizeof(T);     // elements of a lane and step
  constexpr int kStepColumns = 32 * kVector;  // of one warp and step
  static_assert(kStepColumns * kQuantizeSteps == quantize_columns(sizeof(T)), "the launcher's grid covers the row");

  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.chunks) * kQuantizeRows + threadIdx.x / 32;
  if (row >= p.rows) return;  // whole warps leave
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * quantize_columns(sizeof(T)) + lane * kVector;
  const Bits<T>* x = static_cast<const Bits<T>*>(p.x) + row * p.x_stride;
  const EncodedRow out{p.q + row * p.columns, p.scale + row * p.scale_row_stride, p.scale_block_stride, p.columns,
                       p.pow2_scale != 0};

  uint4 loaded[kQuantizeSteps];
#pragma unroll
  for (int step = 0; step < kQuantizeSteps; ++step) {
    const int64_t column = first + step * kStepColumns;
    loaded[step] = load<kVectors>(x + column, p.columns - column);
  }
#pragma unroll
  for (int step = 0; step < kQuantizeSteps; ++step) {
    float values[kVector];
    unpack<T>(loaded[step], values);
    encode<kVectors>(out, first + step * kStepColumns, values);
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
