// What the parameter structs of the FP8 GEMM kernels are made of, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

// What the table of kernels says of those that are made of fp8_tile.cuh.
constexpr uint32_t kFp8Threads = 384;
// As many stages as fit beside the output's slabs.
constexpr uint32_t fp8_stages(uint32_t tile_m, uint32_t tile_n) {
  return tile_m == 256 ? 4 : tile_n == 192 ? 5 : 6;
}
// A stage: two operands, their scales, two barriers; and eight warps' slabs.
constexpr uint32_t fp8_shared_bytes(uint32_t tile_m, uint32_t tile_n) {
  return fp8_stages(tile_m, tile_n) * ((tile_m + tile_n) * (128 + 4) + 16) + 8 * 2048;
}

// Scales in any strides (elements): one per row (1x128) or per 128 rows (128x128), and per 128 of K.
struct ScaleView {
  const float* data;
  int64_t group_stride;
  int64_t row_stride;
  int64_t block_stride;
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
