// Parameters of mla_absorb, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

struct MlaAbsorbParams {
  TensorMap x;       // [heads, T, K] bf16, boxes of a tile's tokens x 64
  TensorMap weight;  // [heads, N, K], boxes of a tile's columns x 64, or, where N is contiguous, [heads, K, N], 64 x 64
  TensorMap out;     // [heads, T, N], boxes of 16 x 64; without vectors there is none
  uint16_t* out_data;
  int64_t out_token_stride, out_head_stride;  // elements
  int32_t tokens, heads, columns;             // T, H and N
  int32_t blocks;                             // of 64 of K
  int32_t token_tiles, column_tiles, tiles;
  uint32_t vectors;  // rows of out start at multiples of 16 bytes
};

// What the table of kernels says of a tile of `rows` tokens and `columns` of N: a stage is 64 of K of both operands and
// two barriers, the output goes through shared memory too, and there are as many stages as fit beside it.
constexpr uint32_t absorb_threads(uint32_t rows) { return 128 + 2 * rows; }
constexpr uint32_t absorb_stages(uint32_t rows, uint32_t columns) {
  return (232448 - rows * columns * 2) / ((rows + columns) * 128 + 16);
}
constexpr uint32_t absorb_shared_bytes(uint32_t rows, uint32_t columns) {
  return absorb_stages(rows, columns) * ((rows + columns) * 128 + 16) + rows * columns * 2;
}

}  // namespace dsv3
