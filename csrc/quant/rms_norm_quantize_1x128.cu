// rms_norm_quantize_1x128: rms_norm, then quantize_1x128 of its result as it was rounded, without reading it back.
//
// Roles, barriers, accesses and the order of the sums: as rms_norm.cu; the 16 lanes that hold a block of 128 columns
// agree on its largest magnitude by shuffles.
// Budget    bytes per element, bf16: 2 + 3 + 4/128, with a residual 4 + 5 + 4/128, each moved once: memory-bound.
#include "quant/rms_norm.cuh"

#define DSV3_RMS_NORM_QUANTIZE(NAME, T)                                                    \
  extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)                         \
      rms_norm_quantize_1x128_warp_##NAME(const __grid_constant__ dsv3::RmsNormParams p) { \
    dsv3::norm<T, 1, true>(p);                                                             \
  }                                                                                        \
  extern "C" __global__ void __launch_bounds__(dsv3::kNormThreads)                         \
      rms_norm_quantize_1x128_row_##NAME(const __grid_constant__ dsv3::RmsNormParams p) {  \
    dsv3::norm<T, 8, true>(p);                                                             \
  }
DSV3_RMS_NORM_QUANTIZE(f32, float)
DSV3_RMS_NORM_QUANTIZE(bf16, __nv_bfloat16)
DSV3_RMS_NORM_QUANTIZE(f16, __half)
