// Parameters of mla_cache_gather, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct MlaCacheGatherParams {
  const uint8_t* cache;        // [pages, page, row_bytes], pages page_stride bytes apart
  const int32_t* block_table;  // [requests, table_columns]
  const int32_t* cu_seqlens;   // [requests + 1]
  uint8_t* latent;             // [total, latent_bytes], contiguous
  uint8_t* rope;               // [total, rope_bytes], contiguous
  int64_t page_stride;         // bytes
  int64_t table_stride;        // elements
  int64_t pages;
  uint32_t page_shift;  // log2 of the page size
  uint32_t table_columns;
  uint32_t requests;
  uint32_t total;
  uint32_t row_bytes;
  uint32_t latent_bytes;
  uint32_t rope_bytes;
  uint32_t vectors;  // 1: all rows and their parts are aligned to 16 bytes
};

}  // namespace dsv3
