// Launchers of the quant family: raw pointers and sizes, elements unless said, strides included; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"

namespace dsv3 {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

void quantize_1x128(const void* x, void* q, void* scale, int64_t rows, int64_t columns, int64_t x_stride,
                    int64_t scale_row_stride, int64_t scale_block_stride, bool pow2_scale, ElementType type,
                    const Target& target);

void quantize_128x128(const void* w, void* q, void* scale, int64_t matrices, int64_t rows, int64_t columns,
                      int64_t w_matrix_stride, int64_t w_row_stride, int64_t scale_matrix_stride,
                      int64_t scale_row_stride, int64_t scale_column_stride, bool pow2_scale, ElementType type,
                      const Target& target);

}  // namespace dsv3
