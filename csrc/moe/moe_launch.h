// What the launchers of this family share.
#pragma once

#include <algorithm>
#include <string>

#include "moe/launchers.h"

namespace dsv3 {

inline bool aligned(const void* address, int64_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

// Bytes from the first element to the last.
inline size_t span(const MoeMatrix& x) {
  if (x.data == nullptr || x.rows == 0 || x.columns == 0) return 0;
  return static_cast<size_t>(((x.rows - 1) * x.row_stride + (x.columns - 1) * x.column_stride + 1) * x.element_bytes);
}

// Rows and places are 32-bit in the kernels.
inline int32_t to_int32(const char* op, const char* what, int64_t value) {
  if (value > INT32_MAX)
    throw Error(std::string(op) + ": " + what + ": got " + std::to_string(value) + ", wanted less than 2^31");
  return static_cast<int32_t>(value);
}

}  // namespace dsv3
