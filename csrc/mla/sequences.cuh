// Which sequence owns a tile of rows, when only the device knows where sequences begin and end.
#pragma once

#include <cstdint>

#include "gemm/group_walk.cuh"

namespace dsv3 {

// Bounds of the rows of `total` that each of `count` sequences owns: cu[b] to cu[b + 1].
struct Sequences {
  const int32_t* cu;
  int32_t count;
  int32_t total;
};

// Rows of group `group`: sequence group - 1; group 0 and the last one are the rows before and after all sequences.
// Bounds that no caller may pass stay inside the tensor.
__device__ __forceinline__ RowRange rows_of(const Sequences& s, int group) {
  const int begin = group == 0 ? 0 : min(max(s.cu[group - 1], 0), s.total);
  const int end = group > s.count ? s.total : min(max(s.cu[group], begin), s.total);
  return {begin, end - begin};
}

// The other side's rows of the same group: nothing belongs to rows of no sequence.
__device__ __forceinline__ RowRange partners_of(const Sequences& s, int group) {
  return group == 0 || group > s.count ? RowRange{0, 0} : rows_of(s, group);
}

}  // namespace dsv3
