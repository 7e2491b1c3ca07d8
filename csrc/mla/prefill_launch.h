// From the launchers' arguments to what the parameter structs of mla_prefill and its gradient hold.
#pragma once

#include <algorithm>

#include "host/tensor_map.h"
#include "mla/rows.h"

namespace dsv3 {

// [rows, heads, columns] as a tensor map [heads, rows, columns] in boxes of `box` rows of 64 columns, swizzled as
// wgmma's descriptors say. Rows that are not there have no map: nothing is loaded. The stride of a dimension of one
// means nothing, and may be what no map takes.
inline TensorMap head_map(Driver& driver, const char* op, const char* argument, const MlaRows& x, uint32_t box) {
  if (x.outer == 0 || x.inner == 0) return {};
  const int64_t head_stride = x.inner > 1 ? x.inner_stride : x.columns;
  const int64_t row_stride = x.outer > 1 ? x.outer_stride : x.inner * head_stride;
  return tensor_map_3d(driver, op, argument, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x.data, x.inner, x.outer, x.columns,
                       head_stride, row_stride, 1, box, 64, CU_TENSOR_MAP_SWIZZLE_128B);
}

// [rows, columns], shared by all heads.
inline TensorMap shared_map(Driver& driver, const char* op, const char* argument, const MlaRows& x, uint32_t box) {
  if (x.inner == 0) return {};
  return tensor_map_2d(driver, op, argument, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x.data, x.inner, x.columns,
                       x.inner > 1 ? x.inner_stride : x.columns, box, 64, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Tiles of so many rows per head that any bounds of the sequences make, at most.
inline int64_t most_tiles(int64_t rows, int64_t per_tile, int64_t sequences, int64_t heads) {
  // Each sequence has one ragged tile at most, and so do the rows before and after all of them.
  return (rows / per_tile + std::min(sequences + 2, rows)) * heads;
}

// Multiprocessors to use: `num_sms` of them, or all (0).
inline int64_t sms_of(Driver& driver, const Target& target, int num_sms) {
  const int64_t sms = driver.multiprocessors(target);
  return num_sms > 0 ? std::min<int64_t>(num_sms, sms) : sms;
}

}  // namespace dsv3
