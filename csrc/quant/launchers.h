// Launchers of the quant family: raw pointers and sizes, elements unless said, strides included; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"
#include "quant/element_type.h"

namespace dsv3 {

void quantize_1x128(const void* x, void* q, void* scale, int64_t rows, int64_t columns, int64_t x_stride,
                    int64_t scale_row_stride, int64_t scale_block_stride, bool pow2_scale, ElementType type,
                    const Target& target);

void quantize_128x128(const void* w, void* q, void* scale, int64_t matrices, int64_t rows, int64_t columns,
                      int64_t w_matrix_stride, int64_t w_row_stride, int64_t scale_matrix_stride,
                      int64_t scale_row_stride, int64_t scale_column_stride, bool pow2_scale, ElementType type,
                      const Target& target);

// Without offsets (nullptr) all tokens are one group.
void quantize_1x128_both(const void* x, const void* offsets, void* q, void* scale, void* q_t, void* scale_t,
                         void* offsets_t, int64_t tokens, int64_t columns, int64_t width, int64_t groups,
                         int64_t x_stride, int64_t scale_row_stride, int64_t scale_block_stride,
                         int64_t scale_t_row_stride, int64_t scale_t_block_stride, bool pow2_scale, ElementType type,
                         const Target& target);

// gate_up is [rows, 2 columns]; without weights (nullptr) they are 1.
void silu_mul_quantize_1x128(const void* gate_up, const void* weights, void* q, void* scale, int64_t rows,
                             int64_t columns, int64_t x_stride, int64_t weight_stride, int64_t scale_row_stride,
                             int64_t scale_block_stride, bool pow2_scale, ElementType type, const Target& target);

// nullptr for what there is not: residual and total, q and scale.
struct NormArguments {
  const void *x, *residual, *weight;
  void *normed, *total, *q, *scale;
  int64_t rows, columns, x_stride, residual_stride, scale_row_stride, scale_block_stride;
  double eps;
  bool pow2_scale;
  ElementType type, weight_type;
};

void rms_norm(const NormArguments& arguments, const Target& target);

void rms_norm_quantize_1x128(const NormArguments& arguments, const Target& target);

// `partial` is a workspace of min(rows, 256) x columns float32.
void rms_norm_backward(const void* grad, const void* x, const void* weight, const void* grad_total, void* grad_x,
                       void* grad_weight, void* partial, int64_t rows, int64_t columns, int64_t x_stride, double eps,
                       ElementType type, ElementType weight_type, const Target& target);

// [matrices, rows, columns] in any strides.
struct QuantMatrices {
  const void* data;
  int64_t matrices, rows, columns, matrix_stride, row_stride, column_stride;
};

// A scale per row of q, or per 128 rows; out is contiguous, of the type named.
void dequantize(const QuantMatrices& q, const QuantMatrices& scale, void* out, bool by_row, ElementType type,
                const Target& target);

}  // namespace dsv3
