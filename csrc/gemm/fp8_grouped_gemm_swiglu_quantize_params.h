// Parameters of fp8_grouped_gemm_swiglu_quantize, shared by host and device.
#pragma once

#include "gemm/fp8_params.h"

namespace dsv3 {

struct Fp8SwigluParams {
  TensorMap a;  // [1, S, K] e4m3, boxes of 128 x 128
  TensorMap b;  // [G, 2 F, K]: gate's rows, then up's; boxes of 128 x 128
  ScaleView a_scale;
  ScaleView b_scale;
  const int32_t* offsets;  // [G + 1]: group g owns rows offsets[g] to offsets[g + 1]
  const float* weights;    // [S], stride below, or nullptr: 1
  uint8_t* q;              // [S, F], contiguous
  float* scale;            // [S, ceil(F / 128)], strides below
  int64_t weight_stride;   // strides in elements
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int32_t groups, rows, f;
  int32_t blocks;  // ceil(K / 128)
  int32_t n_tiles;
  uint32_t vectors;  // 1: rows of q are aligned for stores of 8 bytes
  uint32_t pow2_scale;
};

// A stage: 128 rows of A, 128 of gate and 128 of up, their scales, two barriers. Four of them fit.
constexpr uint32_t kSwigluStages = 4;
constexpr uint32_t kSwigluSharedBytes = kSwigluStages * fp8_stage_bytes(128, 256);

}  // namespace dsv3
