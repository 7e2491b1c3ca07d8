// Parameters of quantize_1x128, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct Quantize1x128Params {
  const void* x;  // [rows, columns], row stride x_stride
  uint8_t* q;     // [rows, columns], contiguous
  float* scale;   // [rows, ceil(columns / 128)], strides below
  int64_t rows;
  int64_t columns;
  int64_t x_stride;            // elements
  int64_t scale_row_stride;    // elements
  int64_t scale_block_stride;  // elements
  uint32_t chunks;             // CTAs along a row
  uint32_t vectors;  // 1: rows of x and q are aligned and columns divide, so that vectors are loaded and stored
  uint32_t pow2_scale;
};

// What one CTA takes: 8 rows, one per warp, so that the scales of neighbouring rows, which are neighbours in memory,
// are written at about the same time; and along each row what its warp loads in kSteps loads of 512 bytes.
inline constexpr uint32_t kQuantizeRows = 8;
inline constexpr uint32_t kQuantizeSteps = 4;
inline constexpr uint32_t kQuantizeThreads = 32 * kQuantizeRows;

constexpr uint32_t quantize_columns(uint32_t element_bytes) { return kQuantizeSteps * 512 / element_bytes; }

}  // namespace dsv3
