// moe_unpermute: out[t] = sum over k of weights[t, k] * rows[row_of[t, k]], in float32 (float64 for float64 rows) and
// in the order of k; and its gradient.
//
// Roles     one CTA of 256 threads per token. Forward: a thread loads 16 bytes of four choices' rows, then adds them in
//           order. Backward: a thread writes its part of each choice's gradient and holds its part of the products with
//           the choice's row; warps sum those by shuffles, one thread per choice the eight warps' sums. Further CTAs
//           look at 32 rows each and write zeros to those that are nobody's.
// Barriers  forward none; backward two __syncthreads per 32 choices, around the warps' sums
// Budget    bytes per token and column: forward K rows read, one written; backward one row read from memory (K times
//           from L1), K written, and K read for the weights' gradient. Memory-bound.
// Accesses  16 bytes a lane, four in flight; rows that are not aligned to them go element by element
// Order     products and sums are rounded one by one, as eager's; only the sums over a row (the weights' gradient) have
//           an order of their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "moe/moe_unpermute_params.h"

namespace dsv3 {
namespace {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// Elements of one access.
template <class T, bool kVectors>
struct alignas(kVectors ? 16 : sizeof(T)) Pack {
  static constexpr int kCount = kVectors ? 16 / sizeof(T) : 1;
  T elements[kCount];
};

template <class T, bool kVectors>
__device__ __forceinline__ void unpermute(const MoeUnpermuteParams& p) {
  using P = Pack<T, kVectors>;
  constexpr int kLoads = 4;
  const int64_t token = blockIdx.x;
  const int32_t* row_of = p.row_of + token * p.choices;
  const Wide<T>* weights = static_cast<const Wide<T>*>(p.weights) + token * p.weight_stride;
  for (int64_t column = threadIdx.x * P::kCount; column < p.columns; column += kUnpermuteThreads * P::kCount) {
    Wide<T> total[P::kCount] = {};
    for (int done = 0; done < p.choices; done += kLoads) {
      P loaded[kLoads];
      bool there[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t row = done + k < p.choices ? row_of[done + k] : -1;
        there[k] = row >= 0;
        if (there[k])
          loaded[k] = *reinterpret_cast<const P*>(static_cast<const T*>(p.rows) + row * p.row_stride + column);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (!there[k]) continue;
        const Wide<T> weight = p.weights != nullptr ? weights[done + k] : 1;
#pragma unroll
        for (int i = 0; i < P::kCount; ++i) total[i] = add(total[i], multiply(widen(loaded[k].elements[i]), weight));
      }
    }
    P result;
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) result.elements[i] = narrow<T>(total[i]);
    *reinterpret_cast<P*>(static_cast<T*>(p.out) + token * p.columns + column) = result;
  }
}

template <class T, bool kVectors>
__device__ __forceinline__ void zero_rows(const MoeUnpermuteBackwardParams& p, int64_t first) {
  using P = Pack<T, kVectors>;
  const int lane = threadIdx.x % 32;
  const bool nobodys = first + lane < p.num_rows && p.source[first + lane] < 0;
  for (uint32_t left = __ballot_sync(~0u, nobodys); left != 0; left &= left - 1) {
    T* row = static_cast<T*>(p.grad_rows) + (first + __ffs(left) - 1) * p.columns;
    P zero;
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) zero.elements[i] = narrow<T>(0);
    for (int64_t column = threadIdx.x * P::kCount; column < p.columns; column += kUnpermuteThreads * P::kCount) {
      *reinterpret_cast<P*>(row + column) = zero;
    }
  }
}

template <class T, bool kVectors>
__device__ __forceinline__ void unpermute_backward(const MoeUnpermuteBackwardParams& p) {
  using P = Pack<T, kVectors>;
  constexpr int kChoices = 32, kWarps = kUnpermuteThreads / 32;
  static_assert(kUnpermuteZeroRows == 32, "a lane per row");
  __shared__ Wide<T> sums[kChoices][kWarps];
  if (blockIdx.x >= p.tokens) {
    zero_rows<T, kVectors>(p, (blockIdx.x - p.tokens) * kUnpermuteZeroRows);
    return;
  }
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t* row_of = p.row_of + token * p.choices;
  const T* grad = static_cast<const T*>(p.grad) + token * p.columns;
  const Wide<T>* weights = static_cast<const Wide<T>*>(p.weights) + token * p.weight_stride;
  for (int done = 0; done < p.choices; done += kChoices) {
    const int count = min(kChoices, p.choices - done);
    for (int k = 0; k < count; ++k) {
      const int64_t row = row_of[done + k];
      Wide<T> sum = 0;
      if (row >= 0) {
        const Wide<T> weight = p.weights != nullptr ? weights[done + k] : 1;
        for (int64_t column = threadIdx.x * P::kCount; column < p.columns; column += kUnpermuteThreads * P::kCount) {
          const P from = *reinterpret_cast<const P*>(grad + column);
          P to;
#pragma unroll
          for (int i = 0; i < P::kCount; ++i) to.elements[i] = narrow<T>(multiply(widen(from.elements[i]), weight));
          *reinterpret_cast<P*>(static_cast<T*>(p.grad_rows) + row * p.columns + column) = to;
          if (p.rows == nullptr) continue;
          const P other = *reinterpret_cast<const P*>(static_cast<const T*>(p.rows) + row * p.row_stride + column);
#pragma unroll
          for (int i = 0; i < P::kCount; ++i) {
            sum = add(sum, multiply(widen(other.elements[i]), widen(from.elements[i])));
          }
        }
      }
      if (p.rows == nullptr) continue;
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum = add(sum, __shfl_xor_sync(~0u, sum, distance));
      if (lane == 0) sums[k][warp] = sum;
    }
    if (p.rows == nullptr) continue;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      Wide<T> total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total = add(total, sums[threadIdx.x][w]);
      static_cast<Wide<T>*>(p.grad_weights)[token * p.choices + done + threadIdx.x] = total;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace dsv3

#define DSV3_MOE_UNPERMUTE(NAME, T)                                                               \
  extern "C" __global__ void __launch_bounds__(dsv3::kUnpermuteThreads)                           \
      moe_unpermute_##NAME(const __grid_constant__ dsv3::MoeUnpermuteParams p) {                  \
    if (p.vectors) {                                                                              \
      dsv3::unpermute<T, true>(p);                                                                \
    } else {                                                                                      \
      dsv3::unpermute<T, false>(p);                                                               \
    }                                                                                             \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(dsv3::kUnpermuteThreads)                           \
      moe_unpermute_backward_##NAME(const __grid_constant__ dsv3::MoeUnpermuteBackwardParams p) { \
    if (p.vectors) {                                                                              \
      dsv3::unpermute_backward<T, true>(p);                                                       \
    } else {                                                                                      \
      dsv3::unpermute_backward<T, false>(p);                                                      \
    }                                                                                             \
  }
DSV3_MOE_UNPERMUTE(f32, float)
DSV3_MOE_UNPERMUTE(bf16, __nv_bfloat16)
DSV3_MOE_UNPERMUTE(f16, __half)
DSV3_MOE_UNPERMUTE(f64, double)
