// Parameters of moe_unpermute and its gradient, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// Types of rows; weights are float64 for float64 rows, else float32.
enum class RowType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct MoeUnpermuteParams {
  const void* rows;       // [rows, columns], row stride below
  const void* weights;    // [tokens, choices], row stride below, or nullptr: 1
  void* out;              // [tokens, columns], contiguous
  const int32_t* row_of;  // [tokens, choices], contiguous; -1 is left out
  int64_t columns;
  int64_t row_stride;
  int64_t weight_stride;
  int32_t choices;
  uint32_t vectors;  // 1: rows are aligned and columns divide, so that vectors are loaded and stored
};

struct MoeUnpermuteBackwardParams {
  const void* grad;       // [tokens, columns], contiguous
  const void* rows;       // [num_rows, columns], row stride below, or nullptr: no gradient of the weights
  const void* weights;    // [tokens, choices], row stride below, or nullptr: 1
  void* grad_rows;        // [num_rows, columns], contiguous
  void* grad_weights;     // [tokens, choices], contiguous
  const int32_t* row_of;  // [tokens, choices], contiguous
  const int32_t* source;  // [num_rows]; -1: nobody's row, whose gradient is 0
  int64_t columns;
  int64_t row_stride;
  int64_t weight_stride;
  int64_t tokens;
  int64_t num_rows;
  int32_t choices;
  uint32_t vectors;
};

inline constexpr uint32_t kUnpermuteThreads = 256;
inline constexpr int32_t kUnpermuteZeroRows = 32;  // rows whose sources one CTA looks at

}  // namespace dsv3
