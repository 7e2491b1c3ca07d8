// The rotation of a pair.
#pragma once

#include "mla/pack.cuh"

namespace dsv3 {

// (a, b) turned by the angle whose cosine and sine are (c, s).
template <class T>
__device__ __forceinline__ void turn(T& a, T& b, float c, float s) {
  const float real = widen(a), imaginary = widen(b);
  a = narrow<T>(__fsub_rn(__fmul_rn(real, c), __fmul_rn(imaginary, s)));
  b = narrow<T>(__fadd_rn(__fmul_rn(real, s), __fmul_rn(imaginary, c)));
}

}  // namespace dsv3
