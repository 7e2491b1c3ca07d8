// Parameters of fp8_grouped_gemm and fp8_masked_gemm, shared by host and device.
#pragma once

#include "gemm/fp8_params.h"

namespace dsv3 {

struct Fp8GroupedGemmParams {
  TensorMap a;  // grouped: [1, S, K], masked: [G, Tmax, K] e4m3, boxes of a tile's rows and 128
  TensorMap b;  // [G, N, K]
  ScaleView a_scale;
  ScaleView b_scale;
  OutputView out;          // [S, N] or [G, Tmax, N]
  const int32_t* offsets;  // [G + 1]: group g owns rows offsets[g] to offsets[g + 1]; masked, [G]: its first offsets[g]
  int32_t groups, rows, n;
  int32_t blocks;  // ceil(K / 128)
  int32_t n_tiles;
};

}  // namespace dsv3
