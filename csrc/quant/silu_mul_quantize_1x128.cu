// silu_mul_quantize_1x128: hidden = silu(gate) * up * weight in float32 of gate_up [T, 2 F], as q [T, F] e4m3 and scale
// [T, F/128].
//
// Roles     8 warps, one row each, as in quantize_1x128: a warp goes along its row in kSiluSteps steps, in each of
//           which a lane takes 16 bytes of gate and 16 of up. No shared memory, no barrier.
// Budget    bytes per element of hidden: 4 + 1 + 4/128 (bf16, f16) or 8 + 1 + 4/128 (float32), each moved once. About
//           37 instructions per element (SASS), two of them on the 16-lane special-function unit; at 128 lanes per SM
//           and cycle that is 3.4 elements, where memory at 3.35 TB/s, 132 SMs and 1.7 GHz delivers 3.0: memory-bound.
// Accesses  loads 16 bytes a lane, 512 contiguous bytes a warp, all of a warp issued before the first is used: 128
//           bytes a lane in flight; stores 8 (4) bytes a lane, every sector whole. Rows that are not aligned to such
//           accesses take the scalar ones.
#include "quant/encode.cuh"
#include "quant/silu.cuh"
#include "quant/silu_mul_quantize_1x128_params.h"

namespace dsv3 {
namespace {

template <class T, bool kVectors>
__device__ __forceinline__ void quantize(const SiluMulQuantizeParams& p) {
  constexpr int kVector = 16 / sizeof(T);     // elements of a lane and step
  constexpr int kStepColumns = 32 * kVector;  // of one warp and step
  static_assert(kStepColumns * kSiluSteps == silu_columns(sizeof(T)), "the launcher's grid covers the row");

  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.chunks) * kSiluRows + threadIdx.x / 32;
  if (row >= p.rows) return;  // whole warps leave
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * silu_columns(sizeof(T)) + lane * kVector;
  const Bits<T>* gate = static_cast<const Bits<T>*>(p.gate_up) + row * p.x_stride;
  const EncodedRow out{p.q + row * p.columns, p.scale + row * p.scale_row_stride, p.scale_block_stride, p.columns,
                       p.pow2_scale != 0};

  uint4 gates[kSiluSteps], ups[kSiluSteps];
#pragma unroll
  for (int step = 0; step < kSiluSteps; ++step) {
    const int64_t column = first + step * kStepColumns;
    gates[step] = load<kVectors>(gate + column, p.columns - column);
    ups[step] = load<kVectors>(gate + p.columns + column, p.columns - column);
  }
  const float weight = p.weights != nullptr ? p.weights[row * p.weight_stride] : 1.0f;
#pragma unroll
  for (int step = 0; step < kSiluSteps; ++step) {
    float values[kVector], up[kVector];
    unpack<T>(gates[step], values);
    unpack<T>(ups[step], up);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = silu_mul(values[i], up[i]) * weight;
    encode<kVectors>(out, first + step * kStepColumns, values);
  }
}

template <class T>
__device__ __forceinline__ void quantize(const SiluMulQuantizeParams& p) {
  if (p.vectors) {
    quantize<T, true>(p);
  } else {
    quantize<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kSiluThreads)
    silu_mul_quantize_1x128_f32(const __grid_constant__ dsv3::SiluMulQuantizeParams p) {
  dsv3::quantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kSiluThreads)
    silu_mul_quantize_1x128_bf16(const __grid_constant__ dsv3::SiluMulQuantizeParams p) {
  dsv3::quantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kSiluThreads)
    silu_mul_quantize_1x128_f16(const __grid_constant__ dsv3::SiluMulQuantizeParams p) {
  dsv3::quantize<__half>(p);
}
