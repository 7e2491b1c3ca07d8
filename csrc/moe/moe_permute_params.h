// Parameters of moe_permute, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct MoePlaceParams {
  const void* experts;  // [tokens, choices] int32 or int64, strides below
  int32_t* offsets;     // [num_experts + 1]
  int32_t* counts;      // [num_experts]
  int32_t* row_of;      // [tokens, choices], contiguous
  int32_t* source;      // [rows]
  int64_t token_stride;
  int64_t choice_stride;
  int32_t tokens;
  int32_t choices;
  int32_t num_experts;
  int32_t alignment;
  int32_t rows;  // the bound
  uint32_t is_int64;
};

// Rows are bytes here; strides of scales count elements.
struct MoeCopyParams {
  const uint8_t* x;        // [tokens, row_bytes], row stride x_stride
  uint8_t* rows;           // [rows, row_bytes], contiguous
  const float* scale;      // [tokens, blocks], or nullptr
  float* row_scale;        // [rows, blocks]
  const int32_t* row_of;   // [tokens, choices]
  const int32_t* offsets;  // [num_experts + 1]
  const int32_t* counts;   // [num_experts]
  int64_t row_bytes;
  int64_t x_stride;
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int64_t row_scale_row_stride;
  int64_t row_scale_block_stride;
  int32_t choices;
  int32_t blocks;
  int32_t padded;  // CTAs that write padding: one per expert, or none
};

inline constexpr uint32_t kPlaceThreads = 1024;  // and choices of a CTA
inline constexpr int32_t kPlaceMostExperts = 1024;
inline constexpr uint32_t kCopyThreads = 256;

}  // namespace dsv3
