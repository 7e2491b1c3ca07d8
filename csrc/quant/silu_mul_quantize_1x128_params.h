// Parameters of silu_mul_quantize_1x128, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct SiluMulQuantizeParams {
  const void* gate_up;   // [rows, 2 columns], row stride x_stride: gate, then up
  const float* weights;  // [rows], or nullptr: 1
  uint8_t* q;            // [rows, columns], contiguous
  float* scale;          // [rows, ceil(columns / 128)], strides below
  int64_t rows;
  int64_t columns;
  int64_t x_stride;  // strides in elements
  int64_t weight_stride;
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  uint32_t chunks;   // CTAs along a row
  uint32_t vectors;  // 1: gate, up and q are aligned and columns divide, so that vectors are loaded and stored
  uint32_t pow2_scale;
};

// A CTA takes 8 rows, one per warp, and along each what its warp loads in kSiluSteps times two loads of 512 bytes.
inline constexpr uint32_t kSiluRows = 8;
inline constexpr uint32_t kSiluSteps = 4;
inline constexpr uint32_t kSiluThreads = 32 * kSiluRows;

constexpr uint32_t silu_columns(uint32_t element_bytes) { return kSiluSteps * 512 / element_bytes; }

}  // namespace dsv3
