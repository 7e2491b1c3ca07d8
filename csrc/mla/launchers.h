// Launchers of the mla family: raw pointers and sizes, elements unless said,
// strides included; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"
#include "mla/cache.h"
#include "mla/rows.h"

namespace dsv3 {

// x and out [tokens, heads, width], positions [tokens].
void rope(const MlaRows& x, const void* positions, bool positions_are_int64, const MlaTable& cos_sin,
          const MlaRows& out, bool interleaved, bool transposed, const Target& target);

// `fp8`: the cache's format; `type` is that of latent and rope then.
void mla_cache_append(const MlaCache& cache, const void* slots, const MlaBytes& latent, const MlaBytes& rope, bool fp8,
                      RowType type, bool pow2_scale, const Target& target);

void mla_cache_gather(const MlaCache& cache, const MlaTable& block_table, const void* cu_seqlens,
                      const MlaBytes& latent, const MlaBytes& rope, bool fp8, const Target& target);

// A log-sum-exp is rows of one column.
void merge_attention(const MlaRows& out_a, const MlaRows& lse_a, const MlaRows& out_b, const MlaRows& lse_b, void* out,
                     void* lse, const Target& target);

// x [T, rank + 576] bf16; of the cache's rows, the bytes tell the format. latent and k_rope are null when not asked
// for.
struct PrologueInputs {
  MlaBytes x;
  const void* q_weight;
  RowType q_weight_type;
  const void* kv_weight;
  RowType kv_weight_type;
  const void* positions;
  bool positions_are_int64;
  MlaTable cos_sin;
  const void* slots;
  int64_t rank;
  double eps;
};
struct PrologueOutputs {
  MlaCache cache;
  void* q;
  void* scale;
  int64_t scale_row_stride, scale_block_stride;
  void* latent;
  void* k_rope;
  bool pow2_scale, cache_pow2_scale;
};
void mla_prologue(const PrologueInputs& x, const PrologueOutputs& y, const Target& target);

// x [T, heads, K] and out [T, heads, N] bf16; a weight [heads, N, K] has columns (N) or depth (K) of stride 1.
struct AbsorbWeight {
  const void* data;
  int64_t head_stride, column_stride, depth_stride;
};
void mla_absorb(const MlaRows& x, const AbsorbWeight& weight, const MlaRows& out, const Target& target);

// q [T, heads, 192], k_nope [S, heads, 128], k_rope [S, 64], v [S, heads, 128]; cu_q and cu_k [sequences + 1].
struct PrefillInputs {
  MlaRows q, k_nope, k_rope, v;
  const void* cu_q;
  const void* cu_k;
  int64_t sequences;
  float scale;
  bool causal;
};
void mla_prefill(const PrefillInputs& x, void* out, void* lse, int num_sms, const Target& target);

// grad_out as out [T, heads, 128], contiguous. Workspaces: delta [T, heads] and rope_parts [head_groups, S, 64],
// float32.
struct PrefillGradients {
  MlaRows grad_out;
  const void* out;
  const void* lse;
  void* delta;
  void* rope_parts;
  int64_t head_groups;
  void* grad_q;
  void* grad_k_nope;
  void* grad_k_rope;
  void* grad_v;
};
void mla_prefill_backward(const PrefillInputs& x, const PrefillGradients& y, int num_sms, const Target& target);

}  // namespace dsv3
