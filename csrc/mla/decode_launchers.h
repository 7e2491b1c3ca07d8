// Launchers of decode: the plan and the attention. Sizes and strides in elements unless said; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"

namespace dsv3 {

// `work` has `items` rows, `bounds` parts + 1 elements.
void mla_decode_plan(const void* lengths, int64_t requests, int64_t parts, int64_t start_cost, bool fixed, void* work,
                     int64_t items, void* splits, void* bounds, const Target& target);

// bfloat16 [requests, queries, heads, columns]; columns are contiguous.
struct DecodeRows {
  void* data;
  int64_t requests, queries, heads;
  int64_t request_stride, query_stride, head_stride;
};

// [pages, page, 576] bfloat16, or [pages, page, 656] bytes: the FP8 format.
struct DecodeCache {
  const void* data;
  int64_t pages, page;
  int64_t page_stride;
  bool fp8;
};

// int32 [requests, entries].
struct DecodeTable {
  const void* data;
  int64_t requests, entries;
  int64_t request_stride;
};

struct DecodePlan {
  const void *work, *splits, *bounds;
  int64_t items, parts;
};

// `workspace`: items * queries * heads * 513 float32, or null where no request has several items; not initialised.
// `simple`: the reference kernel, of bfloat16 caches.
void mla_decode(const DecodeRows& q, const DecodeCache& cache, const DecodeTable& table, const void* lengths,
                const DecodePlan& plan, double softmax_scale, bool causal, const DecodeRows& out, void* lse,
                void* workspace, bool simple, const Target& target);
// A cluster of 2, 4 or 8 CTAs for each request and 64 rows: no plan, no workspace.
void mla_decode_cluster(const DecodeRows& q, const DecodeCache& cache, const DecodeTable& table, const void* lengths,
                        double softmax_scale, bool causal, const DecodeRows& out, void* lse, int64_t cluster,
                        const Target& target);

}  // namespace dsv3
