// What launchers of row-wise mla kernels take: rows of contiguous columns, in two leading dimensions of any strides.
#pragma once

#include <cstdint>

#include "host/driver.h"

namespace dsv3 {

enum class RowType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_bytes(RowType type) { return type == RowType::kFloat32 ? 4 : 2; }

struct MlaRows {
  const void* data;
  int64_t outer, inner, columns;
  int64_t outer_stride, inner_stride;  // elements
  RowType type;
};

inline bool aligned(const void* address, int64_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

// Whether every row starts at a multiple of `to` bytes. The stride of a dimension of one means nothing.
inline bool rows_aligned(const MlaRows& x, int64_t to) {
  const int64_t bytes = element_bytes(x.type);
  return aligned(x.data, to) && (x.outer <= 1 || x.outer_stride * bytes % to == 0) &&
         (x.inner <= 1 || x.inner_stride * bytes % to == 0);
}

// From the first element to the last.
inline Buffer buffer(const MlaRows& x, Access access) {
  if (x.outer == 0 || x.inner == 0 || x.columns == 0) return {x.data, 0, access};
  const int64_t elements = (x.outer - 1) * x.outer_stride + (x.inner - 1) * x.inner_stride + x.columns;
  return {x.data, static_cast<size_t>(elements * element_bytes(x.type)), access};
}

// [rows, columns] of 4-byte elements: cosines and sines, or a block table.
struct MlaTable {
  const void* data;
  int64_t rows, columns, row_stride;
};
inline Buffer buffer(const MlaTable& x) {
  if (x.rows == 0 || x.columns == 0) return {x.data, 0, Access::kRead};
  return {x.data, static_cast<size_t>((x.rows - 1) * x.row_stride + x.columns) * 4, Access::kRead};
}

}  // namespace dsv3
