// The SwiGLU activation in float32: what the quantiser and the fused product share, so that they agree in every bit.
#pragma once

namespace dsv3 {

// silu(gate) * up = gate / (1 + exp(-gate)) * up, in that order, within 1e-6 of its size. expf and the quotient are the
// fast ones that neither overflow nor lose a tail: beyond exp(-gate) = 2^126 the quotient is 0, where its value is
// below 2^-119; an infinite gate of either sign gives infinity or NaN.
__device__ __forceinline__ float silu_mul(float gate, float up) {
  return __fmul_rn(__fdividef(gate, 1.0f + expf(-gate)), up);
}

}  // namespace dsv3
