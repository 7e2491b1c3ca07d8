// Parameters of rope, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct RopeParams {
  const void* x;           // [tokens, heads, 2 * pairs], strides below
  void* out;               // of the same shape
  const void* positions;   // [tokens], int32 or int64
  const float* cos_sin;    // [table_rows, 2 * pairs]: cosines, then sines
  int64_t x_token_stride;  // elements
  int64_t x_head_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t table_stride;
  int64_t table_rows;
  uint32_t rows;  // tokens * heads
  uint32_t heads;
  uint32_t pairs;
  uint32_t positions_are_int64;
  uint32_t interleaved;
  uint32_t transposed;  // 1: by the negative angle
  uint32_t vectors;     // 1: four pairs at a time are aligned
};

// Threads of one CTA and of one row: eight threads of four pairs are DeepSeek-V3's 64.
inline constexpr uint32_t kRopeThreads = 256;
inline constexpr uint32_t kRopeLanes = 8;

}  // namespace dsv3
