// Parameters of mla_prefill_backward's kernels, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

struct MlaPrefillBackwardParams {
  TensorMap q;         // [heads, T, 192] bf16; boxes of 64 rows x 64 columns here and below
  TensorMap grad_out;  // [heads, T, 128]
  TensorMap k_nope;    // [heads, S, 128]
  TensorMap k_rope;    // [S, 64]
  TensorMap v;         // [heads, S, 128]
  const float* lse;    // [T, heads], contiguous
  const float* delta;  // [T, heads], contiguous
  void* grad_q;        // [T, heads, 192] bf16, contiguous
  void* grad_k_nope;   // [S, heads, 128] bf16, contiguous
  void* grad_v;        // [S, heads, 128] bf16, contiguous
  float* rope_parts;   // [head_groups, S, 64]: sums over each group's heads
  const int32_t* cu_q;
  const int32_t* cu_k;
  int32_t sequences;
  int32_t queries, keys;  // T and S
  int32_t heads;
  int32_t head_groups, group_heads;
  float scale;  // positive
  uint32_t causal;
};

struct MlaPrefillDeltaParams {
  const void* out;       // [rows, 128] bf16, contiguous
  const void* grad_out;  // [rows, 128] bf16, contiguous
  float* delta;          // [rows]
  int64_t rows;          // T * heads
};

struct MlaPrefillRopeParams {
  const float* parts;  // [groups, elements]
  void* grad_k_rope;   // [elements] bf16
  int64_t elements;    // S * 64
  int32_t groups;
};

// What the table of kernels says. Shared memory: what stays (128 rows of 192 and of 128), three stages of what passes
// (64 rows of each, and their log-sum-exps and deltas), a slab per consumer warp, and barriers.
constexpr uint32_t kDeltaThreads = 256;
constexpr uint32_t kRopeSumThreads = 256;
constexpr uint32_t kBackwardThreads = 384;
constexpr uint32_t kBackwardStages = 3;
constexpr uint32_t kBackwardSharedBytes =
    128 * 640 + kBackwardStages * (64 * 640 + 2 * 64 * 4) + 8 * 2048 + 8 * (2 + 2 * kBackwardStages);

}  // namespace dsv3
