// Launchers of moe_unpermute and of its gradient.
#include "moe/moe_launch.h"

namespace dsv3 {
namespace {

bool rows_are_vectors(const MoeMatrix& x) {
  const int64_t vector = 16 / x.element_bytes;
  return aligned(x.data, 16) && (x.rows <= 1 || x.row_stride % vector == 0) && x.columns % vector == 0;
}

}  // namespace

void moe_unpermute(const MoeMatrix& rows, RowType type, const MoeMatrix& row_of, const MoeMatrix& weights, void* out,
                   const Target& target) {
  static constexpr const char* kOp = "moe_unpermute";
  static constexpr const Kernel* kKernels[] = {&kernel("moe_unpermute_f32"), &kernel("moe_unpermute_bf16"),
                                               &kernel("moe_unpermute_f16"), &kernel("moe_unpermute_f64")};
  const int64_t tokens = row_of.rows;
  if (tokens == 0 || rows.columns == 0) return;
  MoeUnpermuteParams params{};
  params.rows = rows.data;
  params.weights = weights.data;
  params.out = out;
  params.row_of = static_cast<const int32_t*>(row_of.data);
  params.columns = rows.columns;
  params.row_stride = rows.row_stride;
  params.weight_stride = weights.row_stride;
  params.choices = static_cast<int32_t>(row_of.columns);
  params.vectors = rows_are_vectors(rows) && aligned(out, 16);
  Driver::of(kOp, target)
      .launch(kOp, *kKernels[static_cast<int>(type)], {static_cast<unsigned>(to_int32(kOp, "tokens", tokens)), 1, 1},
              params, target,
              {{rows.data, span(rows), Access::kRead},
               {weights.data, span(weights), Access::kRead},
               {row_of.data, span(row_of), Access::kRead},
               {out, static_cast<size_t>(tokens * rows.columns * rows.element_bytes), Access::kWrite}});
}

void moe_unpermute_backward(const void* grad, const MoeMatrix& rows, RowType type, const MoeMatrix& row_of,
                            const void* source, const MoeMatrix& weights, const MoeMatrix& grad_rows,
                            void* grad_weights, const Target& target) {
  static constexpr const char* kOp = "moe_unpermute_backward";
  static constexpr const Kernel* kKernels[] = {
      &kernel("moe_unpermute_backward_f32"), &kernel("moe_unpermute_backward_bf16"),
      &kernel("moe_unpermute_backward_f16"), &kernel("moe_unpermute_backward_f64")};
  const int64_t tokens = row_of.rows, num_rows = grad_rows.rows;
  const int64_t grid = tokens + (num_rows + kUnpermuteZeroRows - 1) / kUnpermuteZeroRows;
  if (grid == 0) return;
  const bool of_weights = rows.data != nullptr && weights.data != nullptr;
  MoeUnpermuteBackwardParams params{};
  params.grad = grad;
  params.rows = of_weights ? rows.data : nullptr;
  params.weights = weights.data;
  params.grad_rows = grad_rows.data;
  params.grad_weights = grad_weights;
  params.row_of = static_cast<const int32_t*>(row_of.data);
  params.source = static_cast<const int32_t*>(source);
  params.columns = grad_rows.columns;
  params.row_stride = rows.row_stride;
  params.weight_stride = weights.row_stride;
  params.tokens = tokens;
  params.num_rows = num_rows;
  params.choices = static_cast<int32_t>(row_of.columns);
  params.vectors = aligned(grad, 16) && rows_are_vectors(grad_rows) && (!of_weights || rows_are_vectors(rows));
  Driver::of(kOp, target)
      .launch(kOp, *kKernels[static_cast<int>(type)], {static_cast<unsigned>(to_int32(kOp, "rows", grid)), 1, 1},
              params, target,
              {{grad, static_cast<size_t>(tokens * grad_rows.columns * grad_rows.element_bytes), Access::kRead},
               {rows.data, of_weights ? span(rows) : 0, Access::kRead},
               {weights.data, span(weights), Access::kRead},
               {row_of.data, span(row_of), Access::kRead},
               {source, static_cast<size_t>(num_rows) * 4, Access::kRead},
               {grad_rows.data, span(grad_rows), Access::kWrite},
               {grad_weights, of_weights ? static_cast<size_t>(tokens * row_of.columns * weights.element_bytes) : 0,
                Access::kWrite}});
}

}  // namespace dsv3
