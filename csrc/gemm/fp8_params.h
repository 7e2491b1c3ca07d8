// What the parameter structs of the FP8 GEMM kernels are made of, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

// What the table of kernels says of those that are made of fp8_tile.cuh.
constexpr uint32_t kFp8Threads = 384;
// Beside the ring, of a tile of D: eight warps' slabs of output. A tile of fewer than 128 rows also receives the sums
// of up to seven other CTAs there, one 16th of them, on a barrier per warp.
constexpr uint32_t fp8_output_bytes(uint32_t rows, uint32_t columns) {
  return rows >= 128 ? 8 * 2048 : 7 * rows * columns / 8 * 4 + 8 * 8;
}
// A stage: two operands, their scales, two barriers.
constexpr uint32_t fp8_stage_bytes(uint32_t rows, uint32_t columns) { return (rows + columns) * (128 + 4) + 16; }
// As many as fit.
constexpr uint32_t fp8_stages(uint32_t rows, uint32_t columns) {
  return (232448 - fp8_output_bytes(rows, columns)) / fp8_stage_bytes(rows, columns);
}
constexpr uint32_t fp8_shared_bytes(uint32_t rows, uint32_t columns) {
  return fp8_stages(rows, columns) * fp8_stage_bytes(rows, columns) + fp8_output_bytes(rows, columns);
}

// Scales in any strides (elements): one per row (1x128) or per 128 rows (128x128), and per 128 of K.
struct ScaleView {
  const float* data;
  int64_t group_stride;
  int64_t row_stride;
  int64_t block_stride;
  int64_t rows_per_scale;  // 1 or 128
};

// Output in bfloat16 or float32, rows contiguous, strides in elements.
struct OutputView {
  void* data;
  int64_t group_stride;
  int64_t row_stride;
  uint32_t is_float32;
  uint32_t vectors;     // 1: aligned for stores of 16 bytes (bfloat16) or 8 bytes (float32)
  uint32_t accumulate;  // 1: add to what is there
};

}  // namespace dsv3
