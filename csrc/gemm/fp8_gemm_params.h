// Parameters of fp8_gemm, shared by host and device.
#pragma once

#include "gemm/fp8_params.h"

namespace dsv3 {

struct Fp8GemmParams {
  TensorMap a;  // [1, M, K] e4m3, boxes of 128 x 128
  TensorMap b;  // [1, N, K]
  ScaleView a_scale;
  ScaleView b_scale;
  OutputView out;    // [M, N]
  const void* bias;  // [N] or nullptr
  uint32_t bias_is_float32;
  int32_t m, n;
  int32_t blocks;  // ceil(K / 128)
  int32_t m_tiles, n_tiles;
  int32_t split;  // CTAs of a cluster, which share a tile's k-blocks out; 1 but for tiles of fewer than 128 rows
};

}  // namespace dsv3
