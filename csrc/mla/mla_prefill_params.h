// Parameters of mla_prefill, shared by host and device.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace dsv3 {

struct MlaPrefillParams {
  TensorMap q;       // [heads, T, 192] bf16, boxes of 128 rows x 64 columns
  TensorMap k_nope;  // [heads, S, 128]
  TensorMap k_rope;  // [S, 64]
  TensorMap v;       // [heads, S, 128]
  void* out;         // [T, heads, 128] bf16, contiguous
  float* lse;        // [T, heads], contiguous
  const int32_t* cu_q;
  const int32_t* cu_k;
  int32_t sequences;
  int32_t queries, keys;  // T and S
  int32_t heads;
  float scale;  // positive
  uint32_t causal;
};

// What the table of kernels says, and the bytes of the kernel's parts in shared memory.
constexpr uint32_t kPrefillThreads = 384;
constexpr uint32_t kPrefillSharedBytes = 128 * 192 * 2 + 2 * (128 * 192 * 2 + 128 * 128 * 2) + 8 * 2048 + 10 * 8;

}  // namespace dsv3
