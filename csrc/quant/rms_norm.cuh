// Rows of an RMS norm in registers: loads, the fixed order of their sums, stores. Shared by the norm, its gradient and
// the norm that quantises.
//
// A row belongs to kWarps warps, 1 or 8. Step s of warp w is the 256 columns from 256 * (s * kWarps + w) on, 8 a lane.
// Sums are the same bits for either, and in eager: see rms_norm_params.h. Products and sums are rounded one by one
// (__fmul_rn, __fadd_rn), since a fused one would give other bits than eager.
#pragma once

#include "quant/element_type.h"
#include "quant/encode.cuh"
#include "quant/rms_norm_params.h"

namespace dsv3 {

// 8 consecutive elements, as they lie in memory.
template <class T>
struct Eight {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kLoads = 8 / kVector;
  uint4 words[kLoads];

  // From x on, of which the first `left` elements are there.
  template <bool kVectors>
  __device__ __forceinline__ void load_from(const void* x, int64_t first, int left) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      words[i] = load<kVectors>(static_cast<const Bits<T>*>(x) + first + i * kVector, left - i * kVector);
    }
  }
  __device__ __forceinline__ void widen(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float part[kVector];
      unpack<T>(words[i], part);
#pragma unroll
      for (int e = 0; e < kVector; ++e) values[i * kVector + e] = part[e];
    }
  }
  __device__ __forceinline__ void round(const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float* v = values + i * kVector;
      if constexpr (sizeof(T) == 4) {
        words[i] =
            make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
      } else if constexpr (std::is_same_v<T, __half>) {
        words[i] = make_uint4(ptx::cvt_rn_f16x2_f32(v[0], v[1]), ptx::cvt_rn_f16x2_f32(v[2], v[3]),
                              ptx::cvt_rn_f16x2_f32(v[4], v[5]), ptx::cvt_rn_f16x2_f32(v[6], v[7]));
      } else {
        words[i] = make_uint4(ptx::cvt_rn_bf16x2_f32(v[0], v[1]), ptx::cvt_rn_bf16x2_f32(v[2], v[3]),
                              ptx::cvt_rn_bf16x2_f32(v[4], v[5]), ptx::cvt_rn_bf16x2_f32(v[6], v[7]));
      }
    }
  }
  template <bool kVectors>
  __device__ __forceinline__ void store_to(void* x, int64_t first, int left) const {
    if (left <= 0) return;
    Bits<T>* to = static_cast<Bits<T>*>(x) + first;
    if constexpr (kVectors) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) *reinterpret_cast<uint4*>(to + i * kVector) = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint4& four = words[i / kVector];
        const uint32_t all[4] = {four.x, four.y, four.z, four.w};
        const int bit = i % kVector * static_cast<int>(sizeof(T)) * 8;
        if (i < left) to[i] = static_cast<Bits<T>>(all[bit / 32] >> (bit % 32));
      }
    }
  }
};

// 8 weights from `first` on, whatever their type.
template <bool kVectors>
__device__ __forceinline__ void load_weights(const void* weight, uint32_t type, int first, int left,
                                             float (&values)[8]) {
  const auto as = [&](auto eight) {
    eight.template load_from<kVectors>(weight, first, left);
    eight.widen(values);
  };
  if (type == static_cast<uint32_t>(ElementType::kFloat32)) {
    as(Eight<float>{});
  } else if (type == static_cast<uint32_t>(ElementType::kBFloat16)) {
    as(Eight<__nv_bfloat16>{});
  } else {
    as(Eight<__half>{});
  }
}

// kCount sums over the row at once, from what this lane summed in each of its steps modulo 8 / kWarps: partial[i][j] is
// sum i of the steps that belong to warp j of 8. `shared` is [kCount][256]; the row's warps all call.
template <int kWarps, int kCount>
__device__ __forceinline__ void sum_row(float (&partial)[kCount][8 / kWarps], float* shared, float (&sums)[kCount]) {
  const int lane = threadIdx.x % 32;
  float folded[kCount][8];
  if constexpr (kWarps == 8) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[i * 256 + threadIdx.x] = partial[i][0];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int w = 0; w < 8; ++w)
      folded[i][w] = kWarps == 8 ? shared[i * 256 + w * 32 + lane] : partial[i][w % (8 / kWarps)];
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
#pragma unroll
      for (int w = 0; w < half; ++w) folded[i][w] = __fadd_rn(folded[i][w], folded[i][w + half]);
    }
    sums[i] = folded[i][0];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(~0u, sums[i], distance));
    }
  }
}

// 1 / sqrt(mean square + eps), each operation rounded.
__device__ __forceinline__ float root(float squares, int columns, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(columns)), eps)));
}

// One row of kWarps warps: total = x + residual, normed = total * rms * weight, and the latter's codes.
template <class T, int kWarps, bool kVectors, bool kQuantize>
__device__ __forceinline__ void norm_row(const RmsNormParams& p) {
  constexpr int kSteps = kWarps == 1 ? kNormColumnsByWarp / 256 : kNormColumnsByCta / 2048;
  static_assert(kWarps == 1 || kWarps == 8, "the order of the sums is for these");
  __shared__ float shared[kWarps == 8 ? 256 : 1];
  const int warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (8 / kWarps) + (kWarps == 1 ? warp : 0);
  if (row >= p.rows) return;  // whole rows leave
  const int first = kWarps == 1 ? threadIdx.x % 32 * 8 : threadIdx.x * 8;
  constexpr int kStride = 256 * kWarps;

  Eight<T> total[kSteps], residual[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = first + s * kStride;
    total[s].template load_from<kVectors>(p.x, row * p.x_stride + column, p.columns - column);
    if (p.residual != nullptr) {
      residual[s].template load_from<kVectors>(p.residual, row * p.residual_stride + column, p.columns - column);
    }
  }
  float squares[1][8 / kWarps] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float values[8];
    total[s].widen(values);
    if (p.residual != nullptr) {
      const int column = first + s * kStride;
      float added[8];
      residual[s].widen(added);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], added[i]);
      total[s].round(values);
      total[s].widen(values);
      total[s].template store_to<kVectors>(p.total, row * p.columns + column, p.columns - column);
    }
    float& sum = squares[0][s % (8 / kWarps)];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fadd_rn(sum, __fmul_rn(values[i], values[i]));
  }
  float sums[1];
  sum_row<kWarps>(squares, shared, sums);
  const float rms = root(sums[0], p.columns, p.eps);

  EncodedRow out{};
  if constexpr (kQuantize) {
    out = {p.q + row * p.columns, p.scale + row * p.scale_row_stride, p.scale_block_stride, p.columns,
           p.pow2_scale != 0};
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = first + s * kStride;
    float values[8], weights[8];
    total[s].widen(values);
    load_weights<kVectors>(p.weight, p.weight_type, column, p.columns - column, weights);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(__fmul_rn(values[i], rms), weights[i]);
    total[s].round(values);
    total[s].template store_to<kVectors>(p.normed, row * p.columns + column, p.columns - column);
    if constexpr (kQuantize) {
      total[s].widen(values);
      encode<kVectors>(out, column, values);
    }
  }
}

template <class T, int kWarps, bool kQuantize>
__device__ __forceinline__ void norm(const RmsNormParams& p) {
  if (kWarps == 1 || p.vectors) {  // rows that are not aligned are a CTA's, however short
    norm_row<T, kWarps, true, kQuantize>(p);
  } else {
    norm_row<T, 8, false, kQuantize>(p);
  }
}

}  // namespace dsv3
