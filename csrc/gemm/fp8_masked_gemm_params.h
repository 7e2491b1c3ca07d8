// Parameters of fp8_masked_gemm, shared by host and device.
#pragma once

#include "gemm/fp8_params.h"

namespace dsv3 {

struct Fp8MaskedGemmParams {
  TensorMap a;  // [G, Tmax, K] e4m3, boxes of 1 x 128 x 128
  TensorMap b;  // [G, N, K]
  ScaleView a_scale;
  ScaleView b_scale;
  OutputView out;         // [G, Tmax, N]
  const int32_t* counts;  // [G]: rows of each group
  int32_t groups, rows, n;
  int32_t blocks;  // ceil(K / 128)
  int32_t n_tiles;
};

}  // namespace dsv3
