// Parameters of merge_attention, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// One of the two attentions: out [outer, inner, columns] and lse [outer, inner], strides in elements.
struct MergeAttentionPart {
  const void* out;
  const float* lse;
  int64_t out_outer_stride;
  int64_t out_inner_stride;
  int64_t lse_outer_stride;
  int64_t lse_inner_stride;
};

struct MergeAttentionParams {
  MergeAttentionPart parts[2];
  void* out;   // [rows, columns], contiguous
  float* lse;  // [rows], contiguous
  uint32_t rows;
  uint32_t inner;
  uint32_t columns;
  uint32_t vectors;  // 1: rows are aligned to 16 bytes
};

// One warp per row.
inline constexpr uint32_t kMergeRows = 8;

}  // namespace dsv3
