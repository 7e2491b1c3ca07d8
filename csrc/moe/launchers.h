// Launchers of the moe family: raw pointers and sizes, elements unless said, strides included; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"
#include "moe/moe_unpermute_params.h"

namespace dsv3 {

// [rows, columns] in any strides; nullptr where there is none.
struct MoeMatrix {
  void* data;
  int64_t rows, columns, row_stride, column_stride, element_bytes;
};

void moe_gate(const MoeMatrix& logits, const MoeMatrix& bias, void* weights, void* experts, int64_t num_groups,
              int64_t topk_groups, int64_t top_k, double scaling, bool normalize, bool softmax, const Target& target);

void moe_gate_backward(const void* grad_weights, const MoeMatrix& logits, const void* experts, void* grad_logits,
                       int64_t top_k, double scaling, bool normalize, bool softmax, const Target& target);

void moe_permute(const MoeMatrix& x, const MoeMatrix& experts, const MoeMatrix& scale, int64_t num_experts,
                 int64_t alignment, const MoeMatrix& rows, const MoeMatrix& row_scale, void* offsets, void* counts,
                 void* row_of, void* source, const Target& target);

void moe_unpermute(const MoeMatrix& rows, RowType type, const MoeMatrix& row_of, const MoeMatrix& weights, void* out,
                   const Target& target);

// rows is nullptr where the weights need no gradient.
void moe_unpermute_backward(const void* grad, const MoeMatrix& rows, RowType type, const MoeMatrix& row_of,
                            const void* source, const MoeMatrix& weights, const MoeMatrix& grad_rows,
                            void* grad_weights, const Target& target);

}  // namespace dsv3
