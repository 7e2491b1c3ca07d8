// merge_attention: out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b)), lse = log of that sum.
//
// The larger log-sum-exp is taken out first. A row whose log-sum-exp is -inf has weight 0 and its output is not read;
// two of them give 0 and -inf. Sums in float32.
//
// Roles     8 warps, one row each; no shared memory, no barrier
// Budget    bytes per row of D bf16: 4 D + 8 read, 2 D + 4 written, once: memory-bound
// Accesses  16 bytes a lane; rows that are not aligned to such go element by element
#include "mla/merge_attention_params.h"
#include "mla/pack.cuh"
#include "ptx/convert.cuh"

namespace dsv3 {
namespace {

template <class T, int kCount>
__device__ __forceinline__ void merge(const T* const (&rows)[2], const float (&weights)[2], float total, T* out,
                                      uint32_t columns, int lane) {
  using Piece = Pack<T, kCount>;
  for (uint32_t i = lane * kCount; i < columns; i += 32 * kCount) {
    Piece pieces[2] = {};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (weights[part] != 0) pieces[part] = *reinterpret_cast<const Piece*>(rows[part] + i);
    }
    Piece merged;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float a = __fmul_rn(widen(pieces[0].values[j]), weights[0]);
      const float b = __fmul_rn(widen(pieces[1].values[j]), weights[1]);
      merged.values[j] = narrow<T>(__fdiv_rn(__fadd_rn(a, b), total));
    }
    *reinterpret_cast<Piece*>(out + i) = merged;
  }
}

template <class T>
__device__ __forceinline__ void merge(const MergeAttentionParams& p) {
  const uint32_t row = blockIdx.x * kMergeRows + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t outer = row / p.inner, inner = row % p.inner;
  const T* rows[2];
  float lse[2], weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const MergeAttentionPart& part = p.parts[i];
    rows[i] = static_cast<const T*>(part.out) + outer * part.out_outer_stride + inner * part.out_inner_stride;
    lse[i] = part.lse[outer * part.lse_outer_stride + inner * part.lse_inner_stride];
  }
  float top = ptx::max_nan_f32(lse[0], lse[1]);
  if (top == -INFINITY) top = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) weights[i] = expf(lse[i] - top);
  const float total = weights[0] + weights[1];
  if (lane == 0) p.lse[row] = top + logf(total);

  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.columns;
  const float divisor = total == 0 ? 1.0f : total;
  if (p.vectors) {
    merge<T, 16 / sizeof(T)>(rows, weights, divisor, out, p.columns, lane);
  } else {
    merge<T, 1>(rows, weights, divisor, out, p.columns, lane);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(32 * dsv3::kMergeRows)
    merge_attention_f32(const __grid_constant__ dsv3::MergeAttentionParams p) {
  dsv3::merge<float>(p);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kMergeRows)
    merge_attention_bf16(const __grid_constant__ dsv3::MergeAttentionParams p) {
  dsv3::merge<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kMergeRows)
    merge_attention_f16(const __grid_constant__ dsv3::MergeAttentionParams p) {
  dsv3::merge<__half>(p);
}
