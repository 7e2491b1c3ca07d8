// Parameters of mla_cache_append, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct MlaCacheAppendParams {
  uint8_t* cache;        // [pages, page, row_bytes], pages page_stride bytes apart
  const int64_t* slots;  // [tokens]: page * page size + place in the page; outside the cache (-1): skipped
  const uint8_t* latent;
  const uint8_t* rope;
  int64_t latent_stride;  // bytes
  int64_t rope_stride;    // bytes
  int64_t page_stride;    // bytes
  int64_t places;         // pages * page size
  uint32_t page_shift;    // log2 of the page size
  uint32_t tokens;
  uint32_t row_bytes;
  uint32_t latent_bytes;
  uint32_t rope_bytes;
  uint32_t vectors;  // 1: all rows and their parts are aligned to 16 bytes
  uint32_t pow2_scale;
};

}  // namespace dsv3
