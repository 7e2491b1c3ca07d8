// Parameters of quantize_1x128_both, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct Quantize1x128BothParams {
  const void* x;           // [tokens, columns], row stride x_stride
  uint8_t* q;              // [tokens, columns], contiguous
  float* scale;            // [tokens, ceil(columns / 128)], strides below
  uint8_t* q_t;            // [columns, width], contiguous
  float* scale_t;          // [columns, width / 128], strides below
  const int32_t* offsets;  // [groups + 1] or nullptr: one group of all tokens
  int32_t* offsets_t;      // [groups + 1], with offsets
  int64_t tokens;
  int64_t columns;
  int64_t width;     // a multiple of 128
  int64_t x_stride;  // strides in elements
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int64_t scale_t_row_stride;
  int64_t scale_t_block_stride;
  int32_t groups;
  uint32_t chunks;   // CTAs along a row
  uint32_t vectors;  // 1: rows of x, q and q_t are aligned and columns divide, so that vectors are loaded and stored
  uint32_t pow2_scale;
};

inline constexpr uint32_t kBothThreads = 256;
// Blocks of 128 x 128 that a CTA takes, one after the other: it looks its group up once.
inline constexpr uint32_t kBothBlocks = 4;

}  // namespace dsv3
