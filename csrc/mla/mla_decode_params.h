// Parameters of the decode kernels, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

inline constexpr uint32_t kDecodeThreads = 384;
inline constexpr uint32_t kDecodeRows = 64;  // (query, head) pairs that one CTA takes
inline constexpr uint32_t kDecodeKeys = 64;  // keys of a tile
inline constexpr uint32_t kDecodeLatent = 512;
inline constexpr uint32_t kDecodeRope = 64;
inline constexpr uint32_t kDecodeWidth = kDecodeLatent + kDecodeRope;
inline constexpr uint32_t kDecodeFp8Bytes = kDecodeLatent + 4 * 4 + 2 * kDecodeRope;  // of a row of an FP8 cache
inline constexpr uint32_t kDecodeStages = 2;

// Queries' latent part, a ring of key tiles, two tiles of weights, two columns of statistics, barriers
// (decode_tile.cuh).
inline constexpr uint32_t kDecodePanelBytes = 64 * 128;
inline constexpr uint32_t kDecodeTileBytes = 9 * kDecodePanelBytes;
inline constexpr uint32_t kDecodeSharedBytes =
    8 * kDecodePanelBytes + kDecodeStages * kDecodeTileBytes + 2 * kDecodePanelBytes + 4 * 64 * 4 + 10 * 8;

// A cluster's: the log-sum-exps of the other ranks, two barriers (mla_decode_cluster.cu).
inline constexpr uint32_t kDecodeMaxCluster = 8;
inline constexpr uint32_t kDecodeClusterSharedBytes =
    kDecodeSharedBytes + (kDecodeMaxCluster - 1) * kDecodeRows * 4 + 2 * 8;

inline constexpr uint32_t kCombineThreads = 256;
inline constexpr uint32_t kCombineRows = kCombineThreads / 32;  // one per warp

struct MlaDecodeParams {
  TensorMap cache_map;        // bfloat16 cache [pages, page, 576], boxes of min(page, 64) rows and 64 columns
  const uint8_t* cache;       // FP8 cache: rows of 656 bytes
  int64_t cache_page_stride;  // FP8 cache: bytes from page to page
  const uint16_t* q;          // [requests, queries, heads, 576] bfloat16, strides in elements
  int64_t q_request_stride, q_query_stride, q_head_stride;
  uint16_t* out;  // [requests, queries, heads, 512] bfloat16
  int64_t out_request_stride, out_query_stride, out_head_stride;
  float* lse;            // [requests, queries, heads], base e
  float* partial_out;    // [items, queries * heads, 512]: of requests in several items
  float* partial_lse;    // [items, queries * heads], base 2
  const int32_t* table;  // [requests, entries]
  int64_t table_stride;
  const int32_t* lengths;  // [requests]
  const int32_t* work;     // the plan: see dsv3_kernels/mla/mla_decode_plan.py
  const int32_t* splits;
  const int32_t* bounds;
  int32_t queries, heads, rows;  // rows = queries * heads
  int32_t page_bits;             // log2 of the rows of a page
  int32_t max_keys;              // what the table's entries hold: longer lengths are cut to it
  float scale_log2;              // softmax_scale * log2(e), positive
  uint32_t causal;
  uint32_t q_vectors, out_vectors;  // 1: rows start at multiples of 16 bytes
};

}  // namespace dsv3
