// Parameters of dequantize, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct DequantizeParams {
  const uint8_t* q;    // [matrices, rows, columns], strides below
  const float* scale;  // [matrices, rows or ceil(rows / 128), ceil(columns / 128)], strides below
  void* out;           // [matrices, rows, columns], contiguous
  int64_t rows;
  int64_t columns;
  int64_t q_matrix_stride;  // strides in elements
  int64_t q_row_stride;
  int64_t scale_matrix_stride;
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  uint32_t by_row;      // 1: a scale per row, 0: per 128 rows
  uint32_t row_blocks;  // CTAs down a matrix
  uint32_t chunks;      // CTAs along a row
  uint32_t vectors;     // 1: rows are aligned and columns divide, so that vectors are loaded and stored
};

// A CTA takes 8 rows, one per warp, and along each what its warp stores in kDequantizeSteps stores of 512 bytes.
inline constexpr uint32_t kDequantizeRows = 8;
inline constexpr uint32_t kDequantizeSteps = 8;
inline constexpr uint32_t kDequantizeThreads = 32 * kDequantizeRows;

constexpr uint32_t dequantize_columns(uint32_t element_bytes) { return kDequantizeSteps * 512 / element_bytes; }

}  // namespace dsv3
