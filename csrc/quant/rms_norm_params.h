// Parameters of rms_norm, its gradient and rms_norm_quantize_1x128, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// Rows are [rows, columns], contiguous along columns; strides in elements.
struct RmsNormParams {
  const void* x;
  const void* residual;  // or nullptr
  const void* weight;    // [columns]
  void* normed;          // contiguous
  void* total;           // contiguous: x + residual, with a residual
  uint8_t* q;            // contiguous; quantising kernels
  float* scale;          // [rows, ceil(columns / 128)], strides below; quantising kernels
  int64_t rows;
  int64_t x_stride;
  int64_t residual_stride;
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int32_t columns;
  float eps;
  uint32_t weight_type;  // an ElementType
  uint32_t vectors;      // 1: rows are aligned and columns divide, so that vectors are loaded and stored
  uint32_t pow2_scale;
};

struct RmsNormBackwardParams {
  const void* grad;        // contiguous
  const void* x;           // what was normed
  const void* weight;      // [columns]
  const void* grad_total;  // contiguous, or nullptr
  void* grad_x;            // contiguous
  float* partial;          // [slots, columns], contiguous: sums over the rows of a slot
  int64_t rows;
  int64_t x_stride;
  int32_t columns;
  float eps;
  uint32_t weight_type;
  uint32_t vectors;
};

struct RmsNormWeightGradParams {
  const float* partial;  // [slots, columns], contiguous
  void* grad_weight;     // [columns]
  int32_t slots;
  int32_t columns;
  uint32_t weight_type;
};

// The order of every sum over a row, on every backend: a lane takes 8 columns at a time, 32 lanes 256, and 8 warps
// 2048; each lane of each warp adds its elements up in order, then the 8 warps' sums are folded in halves, then the 32
// lanes'.
inline constexpr uint32_t kNormThreads = 256;
inline constexpr int32_t kNormColumnsByWarp = 2048;  // rows up to here are a warp's: 8 times 256 columns in registers
inline constexpr int32_t kNormColumnsByCta = 8192;   // and up to here a CTA's: 4 times 256 columns a warp

// The order of the sums over rows: row r adds to slot r % kNormSlots, in the order of the rows; slot s to group s % 8,
// in the order of the slots; the 8 groups are folded in halves.
inline constexpr int32_t kNormSlots = 256;
inline constexpr int32_t kNormGroups = 8;
inline constexpr int32_t kNormGroupColumns = 32;  // of one CTA that sums slots

}  // namespace dsv3
