// Parameters of quantize_128x128, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct Quantize128x128Params {
  const void* w;  // [matrices, rows, columns], strides below
  uint8_t* q;     // [matrices, rows, columns], contiguous
  float* scale;   // [matrices, ceil(rows / 128), ceil(columns / 128)], strides below
  int64_t rows;
  int64_t columns;
  int64_t w_matrix_stride;  // strides in elements
  int64_t w_row_stride;
  int64_t scale_matrix_stride;
  int64_t scale_row_stride;
  int64_t scale_column_stride;
  uint32_t row_blocks;
  uint32_t column_blocks;
  uint32_t vectors;  // 1: rows of w and q are aligned and columns divide, so that vectors are loaded and stored
  uint32_t pow2_scale;
};

inline constexpr uint32_t kQuantizeBlockThreads = 256;

}  // namespace dsv3
