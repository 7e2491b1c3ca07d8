// Whether rows are laid out for 16-byte accesses, and how many bytes they span: the launchers' side of encode.cuh.
#pragma once

#include <algorithm>

#include "quant/launchers.h"

namespace dsv3 {

constexpr int64_t bytes_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

inline bool aligned(const void* address, int64_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

// All rows begin and end at multiples of 16 bytes.
inline bool rows_are_vectors(const void* x, ElementType type, int64_t rows, int64_t row_stride, int64_t columns) {
  const int64_t vector = 16 / bytes_of(type);
  return aligned(x, 16) && (rows <= 1 || row_stride % vector == 0) && columns % vector == 0;
}

// Bytes from the first element to the last.
inline size_t row_span(int64_t rows, int64_t row_stride, int64_t columns, ElementType type) {
  return static_cast<size_t>(((rows - 1) * row_stride + columns) * bytes_of(type));
}

// Bytes of scales [rows, blocks].
inline size_t scale_span(int64_t rows, int64_t row_stride, int64_t blocks, int64_t block_stride) {
  return static_cast<size_t>((rows - 1) * row_stride + (blocks - 1) * block_stride + 1) * 4;
}

}  // namespace dsv3
