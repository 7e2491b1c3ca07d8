// What launchers of ops on a latent cache take: rows as bytes.
#pragma once

#include <cstdint>

#include "mla/cache_format.h"
#include "mla/rows.h"

namespace dsv3 {

// [pages, page, row_bytes]; rows are contiguous within a page, pages page_stride bytes apart.
struct MlaCache {
  void* data;
  int64_t pages, page, row_bytes, page_stride;

  uint32_t page_shift() const { return static_cast<uint32_t>(__builtin_ctzll(page)); }
  bool aligned_to(int64_t to) const {
    return aligned(data, to) && row_bytes % to == 0 && (pages <= 1 || page_stride % to == 0);
  }
  Buffer buffer(Access access) const {
    return {data, pages == 0 ? 0 : static_cast<size_t>((pages - 1) * page_stride + page * row_bytes), access};
  }
};

// [rows, bytes], rows `stride` bytes apart.
struct MlaBytes {
  void* data;
  int64_t rows, bytes, stride;

  bool aligned_to(int64_t to) const { return aligned(data, to) && bytes % to == 0 && (rows <= 1 || stride % to == 0); }
  Buffer buffer(Access access) const {
    return {data, rows == 0 ? 0 : static_cast<size_t>((rows - 1) * stride + bytes), access};
  }
};

// A warp per token.
inline Dim3 cache_grid(int64_t tokens) {
  return {static_cast<unsigned>((tokens + kCacheTokens - 1) / kCacheTokens), 1, 1};
}

}  // namespace dsv3
