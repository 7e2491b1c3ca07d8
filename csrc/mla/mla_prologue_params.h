// Parameters of mla_prologue, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// Strides in elements unless said.
struct MlaPrologueParams {
  const void* x;          // [tokens, rank + 576] bf16: queries' latent, keys' latent, rotary key
  const void* q_weight;   // [rank]
  const void* kv_weight;  // [512]
  const void* positions;  // [tokens], int32 or int64
  const float* cos_sin;   // [table_rows, 64]: cosines, then sines
  const int64_t* slots;   // [tokens]: page * page size + place in the page; outside the cache (-1): skipped
  uint8_t* cache;         // pages page_stride bytes apart
  uint8_t* q;             // [tokens, rank], contiguous
  float* scale;           // [tokens, ceil(rank / 128)]
  void* latent;           // [tokens, 512] bf16, contiguous, or nullptr
  void* k_rope;           // [tokens, 64] bf16, contiguous, or nullptr
  int64_t x_stride;
  int64_t scale_row_stride;
  int64_t scale_block_stride;
  int64_t table_stride;
  int64_t table_rows;
  int64_t page_stride;  // bytes
  int64_t places;       // pages * page size
  uint32_t page_shift;  // log2 of the page size
  uint32_t tokens;
  int32_t rank;  // at most 2048
  float eps;
  uint32_t q_weight_type, kv_weight_type;  // ElementTypes
  uint32_t positions_are_int64;
  uint32_t pow2_scale, cache_pow2_scale;
};

// Two warps per token: its query, and its key.
constexpr uint32_t kPrologueTokens = 4;
constexpr uint32_t kPrologueThreads = 2 * 32 * kPrologueTokens;

}  // namespace dsv3
