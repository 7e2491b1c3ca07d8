// Launchers of the gemm family: raw pointers, sizes and strides in elements; the target last. Arguments were checked in
// Python.
#pragma once

#include <cstdint>

#include "host/driver.h"

namespace dsv3 {

// E4M3 codes [groups, rows, columns]; columns are contiguous.
struct GemmOperand {
  const void* data;
  int64_t groups, rows, columns;
  int64_t group_stride, row_stride;
};

// Scales [groups, rows, blocks] in any strides.
struct GemmScale {
  const void* data;
  int64_t groups, rows, blocks;
  int64_t group_stride, row_stride, block_stride;
};

// bfloat16 or float32 [groups, rows, columns]; columns are contiguous.
struct GemmOutput {
  void* data;
  int64_t groups, rows, columns;
  int64_t group_stride, row_stride;
  bool is_float32, accumulate;
};

// How a kernel is chosen (csrc/gemm/fp8_select.h).
struct GemmChoice {
  const char* policy;  // "auto" but for fp8_gemm, and for those who measure or test
  int64_t expected_m;  // rows of a masked group, 0: unknown
  int num_sms;         // 0: all
};

void fp8_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
              const void* bias, bool bias_is_float32, const GemmOutput& out, const GemmChoice& choice,
              const Target& target);

void fp8_grouped_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                      const void* offsets, const GemmOutput& out, const GemmChoice& choice, const Target& target);

void fp8_masked_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                     const void* counts, const GemmOutput& out, const GemmChoice& choice, const Target& target);

void fp8_grouped_wgrad(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                       const void* offsets, const GemmOutput& out, const GemmChoice& choice, const Target& target);

// b is [groups, 2 F, K]; weights are one-dimensional, or have no address; q [S, F] is contiguous.
void fp8_grouped_gemm_swiglu_quantize(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b,
                                      const GemmScale& b_scale, const void* offsets, const GemmScale& weights, void* q,
                                      const GemmScale& scale, bool pow2_scale, int num_sms, const Target& target);

}  // namespace dsv3
