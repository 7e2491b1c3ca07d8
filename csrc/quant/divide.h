// Division by one divisor many times, with the bits of IEEE division and without its cost. Host and device share it.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DSV3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSV3_HOST_DEVICE inline
#endif

namespace dsv3 {

// x / divisor rounded to nearest even, given reciprocal = 1 / divisor rounded to nearest: a product and two Newton
// steps, five instructions. After the first step the quotient is within one unit of the last place; its remainder is
// then exact in a fused multiply-add, and adding remainder * reciprocal rounds correctly (P. Markstein, "Computation of
// elementary functions on the IBM RISC System/6000", 1990, theorem 8.1; the same steps end IA-64's division).
//
// That needs divisor, reciprocal and remainders to be normal: 2^-100 <= divisor <= 2^120 and a quotient of 2^-24 or
// more. Smaller quotients come out smaller than 2^-23, with the sign of x: as E4M3, whose codes are multiples of 2^-9,
// that is the same zero. Remainders are negated so that a quotient of -0 stays -0.
DSV3_HOST_DEVICE float divide(float x, float divisor, float reciprocal) {
  float quotient = x * reciprocal;
  float negated = fmaf(divisor, quotient, -x);
  quotient = fmaf(-negated, reciprocal, quotient);
  negated = fmaf(divisor, quotient, -x);
  return fmaf(-negated, reciprocal, quotient);
}

}  // namespace dsv3
