// The table of shipped kernels. A row belongs to one `extern "C"` kernel of one image (csrc/<family>/<image>.cu);
// tests hold it against what the images really contain.
#pragma once

#include <cstddef>
#include <string_view>

namespace dsv3 {

struct Kernel {
  const char* name;
  const char* image;
  unsigned threads;       // per CTA, along x
  unsigned shared_bytes;  // dynamic shared memory per CTA
  unsigned cluster;       // CTAs per cluster, along x
  const char* tile;       // what one CTA works on, in words for `explain`
  bool waits = false;     // runs griddepcontrol.wait before it touches memory: may start before its predecessor ends
};

inline constexpr Kernel kKernels[] = {
    {"quantize_1x128_f32", "quantize_1x128", 256, 0, 1, "64 blocks of 128"},
    {"quantize_1x128_bf16", "quantize_1x128", 256, 0, 1, "64 blocks of 128"},
    {"quantize_1x128_f16", "quantize_1x128", 256, 0, 1, "64 blocks of 128"},
    {"quantize_128x128_f32", "quantize_128x128", 256, 0, 1, "a block of 128 x 128"},
    {"quantize_128x128_bf16", "quantize_128x128", 256, 0, 1, "a block of 128 x 128"},
    {"quantize_128x128_f16", "quantize_128x128", 256, 0, 1, "a block of 128 x 128"},
    {"quantize_1x128_both_f32", "quantize_1x128_both", 256, 0, 1, "4 blocks of 128 x 128"},
    {"quantize_1x128_both_bf16", "quantize_1x128_both", 256, 0, 1, "4 blocks of 128 x 128"},
    {"quantize_1x128_both_f16", "quantize_1x128_both", 256, 0, 1, "4 blocks of 128 x 128"},
    {"dequantize_f32", "dequantize", 256, 0, 1, "8 rows"},
    {"dequantize_bf16", "dequantize", 256, 0, 1, "8 rows"},
    {"dequantize_f16", "dequantize", 256, 0, 1, "8 rows"},
    {"silu_mul_quantize_1x128_f32", "silu_mul_quantize_1x128", 256, 0, 1, "8 rows"},
    {"silu_mul_quantize_1x128_bf16", "silu_mul_quantize_1x128", 256, 0, 1, "8 rows"},
    {"silu_mul_quantize_1x128_f16", "silu_mul_quantize_1x128", 256, 0, 1, "8 rows"},
    {"rms_norm_warp_f32", "rms_norm", 256, 0, 1, "8 rows"},
    {"rms_norm_row_f32", "rms_norm", 256, 0, 1, "a row"},
    {"rms_norm_backward_f32", "rms_norm", 256, 0, 1, "every 256th row"},
    {"rms_norm_warp_bf16", "rms_norm", 256, 0, 1, "8 rows"},
    {"rms_norm_row_bf16", "rms_norm", 256, 0, 1, "a row"},
    {"rms_norm_backward_bf16", "rms_norm", 256, 0, 1, "every 256th row"},
    {"rms_norm_warp_f16", "rms_norm", 256, 0, 1, "8 rows"},
    {"rms_norm_row_f16", "rms_norm", 256, 0, 1, "a row"},
    {"rms_norm_backward_f16", "rms_norm", 256, 0, 1, "every 256th row"},
    {"rms_norm_backward_weight", "rms_norm", 256, 0, 1, "32 columns"},
    {"rms_norm_quantize_1x128_warp_f32", "rms_norm_quantize_1x128", 256, 0, 1, "8 rows"},
    {"rms_norm_quantize_1x128_row_f32", "rms_norm_quantize_1x128", 256, 0, 1, "a row"},
    {"rms_norm_quantize_1x128_warp_bf16", "rms_norm_quantize_1x128", 256, 0, 1, "8 rows"},
    {"rms_norm_quantize_1x128_row_bf16", "rms_norm_quantize_1x128", 256, 0, 1, "a row"},
    {"rms_norm_quantize_1x128_warp_f16", "rms_norm_quantize_1x128", 256, 0, 1, "8 rows"},
    {"rms_norm_quantize_1x128_row_f16", "rms_norm_quantize_1x128", 256, 0, 1, "a row"},
    {"fp8_gemm_128x128_block", "fp8_gemm", 384, 219232, 1, "128 x 128 of D, persistent", true},
    {"fp8_gemm_128x128_row", "fp8_gemm", 384, 219232, 1, "128 x 128 of D, persistent", true},
    {"fp8_gemm_256x128_block", "fp8_gemm", 384, 219200, 1, "256 x 128 of D, persistent", true},
    {"fp8_gemm_128x192_block", "fp8_gemm", 384, 227664, 1, "128 x 192 of D, persistent", true},
    {"fp8_gemm_128x256_block", "fp8_gemm", 384, 219232, 2, "128 x 128 of D, beside another CTA's, persistent", true},
    {"fp8_gemm_256x256_block", "fp8_gemm", 384, 219200, 2, "256 x 128 of D, beside another CTA's, persistent", true},
    {"fp8_gemm_64x128", "fp8_gemm", 384, 231616, 1, "64 x 128 of D, persistent, or a share of its K", true},
    {"fp8_gemm_32x128", "fp8_gemm", 384, 225760, 1, "32 x 128 of D, persistent, or a share of its K", true},
    {"fp8_gemm_16x128", "fp8_gemm", 384, 216496, 1, "16 x 128 of D, persistent, or a share of its K", true},
    {"fp8_gemm_8x128", "fp8_gemm", 384, 219264, 1, "8 x 128 of D, persistent, or a share of its K", true},
    {"fp8_grouped_gemm_128x128_block", "fp8_grouped_gemm", 384, 219232, 1, "128 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_128x128_row", "fp8_grouped_gemm", 384, 219232, 1, "128 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_256x128_block", "fp8_grouped_gemm", 384, 219200, 1, "256 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_256x256_block", "fp8_grouped_gemm", 384, 219200, 2,
     "256 x 128 of a group, beside another CTA's, persistent", true},
    {"fp8_grouped_gemm_64x128", "fp8_grouped_gemm", 384, 231616, 1, "64 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_32x128", "fp8_grouped_gemm", 384, 225760, 1, "32 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_16x128", "fp8_grouped_gemm", 384, 216496, 1, "16 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_8x128", "fp8_grouped_gemm", 384, 219264, 1, "8 x 128 of a group, persistent", true},
    {"fp8_grouped_gemm_swiglu_quantize_block", "fp8_grouped_gemm_swiglu_quantize", 384, 202816, 1,
     "128 x 128 of hidden, persistent", true},
    {"fp8_grouped_gemm_swiglu_quantize_row", "fp8_grouped_gemm_swiglu_quantize", 384, 202816, 1,
     "128 x 128 of hidden, persistent", true},
    {"fp8_masked_gemm_128x128_block", "fp8_masked_gemm", 384, 219232, 1, "128 x 128 of a group, persistent", true},
    {"fp8_masked_gemm_128x128_row", "fp8_masked_gemm", 384, 219232, 1, "128 x 128 of a group, persistent", true},
    {"fp8_masked_gemm_64x128", "fp8_masked_gemm", 384, 231616, 1, "64 x 128 of a group, persistent", true},
    {"fp8_masked_gemm_32x128", "fp8_masked_gemm", 384, 225760, 1, "32 x 128 of a group, persistent", true},
    {"fp8_masked_gemm_16x128", "fp8_masked_gemm", 384, 216496, 1, "16 x 128 of a group, persistent", true},
    {"fp8_masked_gemm_8x128", "fp8_masked_gemm", 384, 219264, 1, "8 x 128 of a group, persistent", true},
    {"fp8_grouped_wgrad_128x128", "fp8_grouped_wgrad", 384, 219232, 1, "128 x 128 of a gradient, persistent", true},
    {"fp8_grouped_wgrad_256x128", "fp8_grouped_wgrad", 384, 219200, 1, "256 x 128 of a gradient, persistent", true},
    {"fp8_grouped_wgrad_256x256", "fp8_grouped_wgrad", 384, 219200, 2,
     "256 x 128 of a gradient, beside another CTA's, persistent", true},
    {"mla_decode_plan", "mla_decode_plan", 256, 0, 1, "a whole batch"},
    {"mla_decode_bf16", "mla_decode", 384, 230480, 1, "64 rows of a request, 64 keys at a time, persistent", true},
    {"mla_decode_bf16_pair", "mla_decode", 384, 230480, 2, "64 rows of a request, 64 keys at a time, persistent", true},
    {"mla_decode_fp8", "mla_decode", 384, 230480, 1, "64 rows of a request, 64 keys at a time, persistent", true},
    {"mla_decode_bf16_cluster", "mla_decode_cluster", 384, 232288, 8, "64 rows of a request, by a cluster", true},
    {"mla_decode_fp8_cluster", "mla_decode_cluster", 384, 232288, 8, "64 rows of a request, by a cluster", true},
    {"mla_decode_combine", "mla_decode", 256, 0, 1, "8 rows of a request", true},
    {"mla_decode_simple", "mla_decode_simple", 384, 230480, 1, "64 rows of a request, 64 keys at a time, persistent",
     true},
    {"rope_f32", "rope", 256, 0, 1, "32 rows"},
    {"rope_bf16", "rope", 256, 0, 1, "32 rows"},
    {"rope_f16", "rope", 256, 0, 1, "32 rows"},
    {"mla_cache_append_copy", "mla_cache_append", 256, 0, 1, "8 tokens"},
    {"mla_cache_append_fp8_f32", "mla_cache_append", 256, 0, 1, "8 tokens"},
    {"mla_cache_append_fp8_bf16", "mla_cache_append", 256, 0, 1, "8 tokens"},
    {"mla_cache_append_fp8_f16", "mla_cache_append", 256, 0, 1, "8 tokens"},
    {"mla_cache_gather_copy", "mla_cache_gather", 256, 0, 1, "8 tokens"},
    {"mla_cache_gather_fp8", "mla_cache_gather", 256, 0, 1, "8 tokens"},
    {"merge_attention_f32", "merge_attention", 256, 0, 1, "8 rows"},
    {"merge_attention_bf16", "merge_attention", 256, 0, 1, "8 rows"},
    {"merge_attention_f16", "merge_attention", 256, 0, 1, "8 rows"},
    {"mla_prefill_128x128", "mla_prefill", 384, 229456, 1, "128 queries of a head, persistent"},
    {"mla_prefill_backward_delta", "mla_prefill_backward", 256, 0, 1, "16 rows"},
    {"mla_prefill_backward_keys", "mla_prefill_backward", 384, 222784, 1, "128 keys of a group of heads, persistent"},
    {"mla_prefill_backward_queries", "mla_prefill_backward", 384, 222784, 1, "128 queries of a head, persistent"},
    {"mla_prefill_backward_rope", "mla_prefill_backward", 256, 0, 1, "16 rows"},
    {"moe_gate_256", "moe_gate", 256, 0, 1, "8 tokens of up to 256 experts"},
    {"moe_gate_512", "moe_gate", 256, 0, 1, "8 tokens of up to 512 experts"},
    {"moe_gate_backward_256", "moe_gate", 256, 0, 1, "8 tokens of up to 256 experts"},
    {"moe_gate_backward_512", "moe_gate", 256, 0, 1, "8 tokens of up to 512 experts"},
    {"moe_permute_place", "moe_permute", 1024, 0, 1, "1024 choices"},
    {"moe_permute_copy_vectors", "moe_permute", 256, 0, 1, "a token, or the padding of an expert"},
    {"moe_permute_copy_bytes", "moe_permute", 256, 0, 1, "a token, or the padding of an expert"},
    {"moe_unpermute_f32", "moe_unpermute", 256, 0, 1, "a token"},
    {"moe_unpermute_backward_f32", "moe_unpermute", 256, 0, 1, "a token, or 32 rows"},
    {"moe_unpermute_bf16", "moe_unpermute", 256, 0, 1, "a token"},
    {"moe_unpermute_backward_bf16", "moe_unpermute", 256, 0, 1, "a token, or 32 rows"},
    {"moe_unpermute_f16", "moe_unpermute", 256, 0, 1, "a token"},
    {"moe_unpermute_backward_f16", "moe_unpermute", 256, 0, 1, "a token, or 32 rows"},
    {"moe_unpermute_f64", "moe_unpermute", 256, 0, 1, "a token"},
    {"moe_unpermute_backward_f64", "moe_unpermute", 256, 0, 1, "a token, or 32 rows"},
    {"mla_prologue_bf16", "mla_prologue", 256, 0, 1, "4 tokens"},
    {"mla_prologue_fp8", "mla_prologue", 256, 0, 1, "4 tokens"},
    {"mla_absorb_64x64_k", "mla_absorb", 256, 221392, 1, "64 tokens x 64 columns of a head, persistent", true},
    {"mla_absorb_64x64_n", "mla_absorb", 256, 221392, 1, "64 tokens x 64 columns of a head, persistent", true},
    {"mla_absorb_64x128_k", "mla_absorb", 256, 213120, 1, "64 tokens x 128 columns of a head, persistent", true},
    {"mla_absorb_64x128_n", "mla_absorb", 256, 213120, 1, "64 tokens x 128 columns of a head, persistent", true},
    {"mla_absorb_128x128_k", "mla_absorb", 384, 229472, 1, "128 tokens x 128 columns of a head, persistent", true},
    {"mla_absorb_128x128_n", "mla_absorb", 384, 229472, 1, "128 tokens x 128 columns of a head, persistent", true},
};

inline constexpr size_t kNumKernels = sizeof(kKernels) / sizeof(kKernels[0]);

// The row of a kernel; a name that is not in the table does not compile.
constexpr const Kernel& kernel(std::string_view name) {
  for (const Kernel& row : kKernels) {
    if (name == row.name) return row;
  }
  throw "no such kernel";
}

}  // namespace dsv3
