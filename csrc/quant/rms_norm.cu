// rms_norm: total = x + residual (rounded), normed = total * rsqrt(mean(total^2) + eps) * weight, over rows of up to
// 8192 columns; and the gradient of both.
//
// Roles     forward: a warp per aligned row of up to 2048 columns (_warp), else a CTA of 8 warps (_row): the row stays
//           in registers between its two uses. Backward: CTA s takes rows s, s + 256, ... and holds the weight's
//           gradient of its rows in registers; a second kernel adds up the 256 sums of each column, a warp per 32
//           slots.
// Barriers  a CTA's row: one __syncthreads for its sums; in the backward loop a second one, before the next row writes
//           where this one still reads.
// Budget    bytes per element, bf16: forward 2 + 2, with a residual 4 + 4; backward 4 + 2, with a gradient of the sum
//           6 + 2, each moved once; and the weight (28 KB at 7168 columns in float32), which every row reads from L1 or
//           L2. The backward's partial sums are 256 rows of float32, written and read once. All memory-bound.
// Accesses  16 bytes a lane, 512 contiguous bytes a warp (twice for float32); all loads of a row are issued before the
//           first is used. Rows that are not aligned to such accesses take the scalar ones, of _row.
// Order     every sum has a fixed order (rms_norm_params.h), the same in eager: results are the same bits.
#include "quant/rms_norm.cuh"

namespace dsv3 {
namespace {

template <class T, bool kVectors>
__device__ __forceinline__ void backward(const RmsNormBackwardParams& p) {
  constexpr int kSteps = kNormColumnsByCta / 2048;
  __shared__ float shared[2 * 256];
  const int first = threadIdx.x * 8;
  float weight_grad[kSteps][8] = {};
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += kNormSlots) {
    Eight<T> x[kSteps], grad[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = first + s * 2048;
      x[s].template load_from<kVectors>(p.x, row * p.x_stride + column, p.columns - column);
      grad[s].template load_from<kVectors>(p.grad, row * p.columns + column, p.columns - column);
    }
    float partial[2][1] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float values[8], grads[8], weights[8];
      x[s].widen(values);
      grad[s].widen(grads);
      const int column = first + s * 2048;
      load_weights<kVectors>(p.weight, p.weight_type, column, p.columns - column, weights);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        partial[0][0] = __fadd_rn(partial[0][0], __fmul_rn(values[i], values[i]));
        partial[1][0] = __fadd_rn(partial[1][0], __fmul_rn(__fmul_rn(grads[i], weights[i]), values[i]));
      }
    }
    float sums[2];
    sum_row<8>(partial, shared, sums);
    const float rms = root(sums[0], p.columns, p.eps);
    const float mean = __fmul_rn(__fdiv_rn(sums[1], static_cast<float>(p.columns)), rms);  // of pull * unit
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = first + s * 2048, left = p.columns - column;
      float values[8], grads[8], weights[8], results[8];
      x[s].widen(values);
      grad[s].widen(grads);
      load_weights<kVectors>(p.weight, p.weight_type, column, left, weights);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float unit = __fmul_rn(values[i], rms);
        weight_grad[s][i] = __fadd_rn(weight_grad[s][i], __fmul_rn(grads[i], unit));
        results[i] = __fmul_rn(rms, __fsub_rn(__fmul_rn(grads[i], weights[i]), __fmul_rn(unit, mean)));
      }
      if (p.grad_total != nullptr) {
        Eight<T> total;
        total.template load_from<kVectors>(p.grad_total, row * p.columns + column, left);
        float added[8];
        total.widen(added);
#pragma unroll
        for (int i = 0; i < 8; ++i) results[i] = __fadd_rn(results[i], added[i]);
      }
      Eight<T> rounded;
      rounded.round(results);
      rounded.template store_to<kVectors>(p.grad_x, row * p.columns + column, left);
    }
    __syncthreads();  // the sums have been read
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = first + s * 2048;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < p.columns)
        p.partial[static_cast<int64_t>(blockIdx.x) * p.columns + column + i] = weight_grad[s][i];
    }
  }
}

template <class T>
__device__ __forceinline__ void backward(const RmsNormBackwardParams& p) {
  if (p.vectors) {
    backward<T, true>(p);
  } else {
    backward<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

#define DSV3_RMS_NORM(NAME, T)                                                          \
  extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)                      \
      rms_norm_warp_##NAME(const __grid_constant__ dsv3::RmsNormParams p) {             \
    dsv3::norm<T, 1, false>(p);                                                         \
  }                                                                                     \
  extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)                      \
      rms_norm_row_##NAME(const __grid_constant__ dsv3::RmsNormParams p) {              \
    dsv3::norm<T, 8, false>(p);                                                         \
  }                                                                                     \
  extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)                      \
      rms_norm_backward_##NAME(const __grid_constant__ dsv3::RmsNormBackwardParams p) { \
    dsv3::backward<T>(p);                                                               \
  }
DSV3_RMS_NORM(f32, float)
DSV3_RMS_NORM(bf16, __nv_bfloat16)
DSV3_RMS_NORM(f16, __half)

extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)
    rms_norm_backward_weight(const __grid_constant__ dsv3::RmsNormWeightGradParams p) {
  __shared__ float sums[dsv3::kNormGroups][dsv3::kNormGroupColumns];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int column = blockIdx.x * dsv3::kNormGroupColumns + lane;
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 8
    for (int slot = group; slot < p.slots; slot += dsv3::kNormGroups) {
      sum = __fadd_rn(sum, p.partial[static_cast<int64_t>(slot) * p.columns + column]);
    }
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group > 0 || column >= p.columns) return;
  float folded[dsv3::kNormGroups];
#pragma unroll
  for (int g = 0; g < dsv3::kNormGroups; ++g) folded[g] = sums[g][lane];
#pragma unroll
  for (int half = dsv3::kNormGroups / 2; half > 0; half /= 2) {
#pragma unroll
    for (int g = 0; g < half; ++g) folded[g] = __fadd_rn(folded[g], folded[g + half]);
  }
  if (p.weight_type == static_cast<uint32_t>(dsv3::ElementType::kFloat32)) {
    static_cast<float*>(p.grad_weight)[column] = folded[0];
  } else if (p.weight_type == static_cast<uint32_t>(dsv3::ElementType::kBFloat16)) {
    static_cast<__nv_bfloat16*>(p.grad_weight)[column] = __float2bfloat16_rn(folded[0]);
  } else {
    static_cast<__half*>(p.grad_weight)[column] = __float2half_rn(folded[0]);
  }
}
