// The gate's scores with one set of bits on every backend: float32 operations that IEEE 754 rounds, one by one, in an
// order that eager has too. A gate compares scores; equal ones must be equal everywhere, or ties go astray.
#pragma once

#include <cstdint>

namespace dsv3 {

// exp(x) within 2 units of the last place: x = n ln 2 + r, a polynomial in r (coefficients of Cephes' expf), times 2^n
// in two factors, so that subnormal results are rounded once.
__device__ __forceinline__ float portable_exp(float x) {
  const float within = fminf(fmaxf(x, -104.0f), 89.0f);
  const float n = rintf(__fmul_rn(within, 1.44269504088896341f));
  float r = __fsub_rn(within, __fmul_rn(n, 0.693359375f));
  r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  constexpr float kCoefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                     5.0000001201e-1f};
#pragma unroll
  for (int i = 0; i < 5; ++i) p = __fadd_rn(__fmul_rn(p, r), kCoefficients[i]);
  const float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  const int power = static_cast<int>(n), half = power >> 1;
  const float low = __int_as_float((half + 127) << 23), high = __int_as_float((power - half + 127) << 23);
  const float result = __fmul_rn(__fmul_rn(y, low), high);
  return x != x ? x : result;
}

// Sum over a warp's values, value i of lane l being number 32 i + l: in order of i, then halves of the lanes.
template <int kCount>
__device__ __forceinline__ float lane_sum(const float (&values)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum = __fadd_rn(sum, values[i]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  return sum;
}

__device__ __forceinline__ float sigmoid(float logit) { return __frcp_rn(__fadd_rn(1.0f, portable_exp(-logit))); }

// What softmax divides by; number 32 i + l of `logits` is value i of lane l, -inf beyond the last.
struct Softmax {
  float largest, sum;
  template <int kCount>
  __device__ __forceinline__ explicit Softmax(const float (&logits)[kCount]) {
    largest = logits[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = ptx::max_nan_f32(largest, logits[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      largest = ptx::max_nan_f32(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    float powers[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) powers[i] = portable_exp(__fsub_rn(logits[i], largest));
    sum = lane_sum(powers);
  }
  __device__ __forceinline__ float operator()(float logit) const {
    return __fdiv_rn(portable_exp(__fsub_rn(logit, largest)), sum);
  }
};

}  // namespace dsv3
