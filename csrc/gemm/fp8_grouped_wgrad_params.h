// Parameters of fp8_grouped_wgrad, shared by host and device.
#pragma once

#include "gemm/fp8_params.h"

namespace dsv3 {

struct Fp8GroupedWgradParams {
  TensorMap a;  // [1, M, S] e4m3, boxes of 128 x 128
  TensorMap b;  // [1, N, S]
  ScaleView a_scale;
  ScaleView b_scale;
  OutputView out;          // [G, M, N]
  const int32_t* offsets;  // [G + 1], multiples of 128: group g owns columns offsets[g] to offsets[g + 1] of a and b
  int32_t groups, m, n;
  int32_t blocks;  // S / 128, rounded up
  int32_t m_tiles, n_tiles;
};

}  // namespace dsv3
