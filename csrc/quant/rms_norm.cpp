// Launchers of rms_norm and of its gradient.
#include "quant/rms_norm_launch.h"

namespace dsv3 {

void rms_norm(const NormArguments& arguments, const Target& target) {
  static constexpr const Kernel* kWarp[] = {&kernel("rms_norm_warp_f32"), &kernel("rms_norm_warp_bf16"),
                                            &kernel("rms_norm_warp_f16")};
  static constexpr const Kernel* kRow[] = {&kernel("rms_norm_row_f32"), &kernel("rms_norm_row_bf16"),
                                           &kernel("rms_norm_row_f16")};
  const int type = static_cast<int>(arguments.type);
  launch_norm("rms_norm", *kWarp[type], *kRow[type], arguments, target);
}

void rms_norm_backward(const void* grad, const void* x, const void* weight, const void* grad_total, void* grad_x,
                       void* grad_weight, void* partial, int64_t rows, int64_t columns, int64_t x_stride, double eps,
                       ElementType type, ElementType weight_type, const Target& target) {
  static constexpr const char* kOp = "rms_norm_backward";
  static constexpr const Kernel* kRows[] = {&kernel("rms_norm_backward_f32"), &kernel("rms_norm_backward_bf16"),
                                            &kernel("rms_norm_backward_f16")};
  static constexpr const Kernel& kWeight = kernel("rms_norm_backward_weight");
  if (columns == 0) return;
  if (columns > kNormColumnsByCta) throw Error("rms_norm_backward: x has longer rows than a CTA keeps");
  Driver& driver = Driver::of(kOp, target);
  const int64_t slots = std::min<int64_t>(rows, kNormSlots);
  const size_t partial_bytes = static_cast<size_t>(slots * columns) * 4;
  if (rows > 0) {
    RmsNormBackwardParams params{};
    params.grad = grad;
    params.x = x;
    params.weight = weight;
    params.grad_total = grad_total;
    params.grad_x = grad_x;
    params.partial = static_cast<float*>(partial);
    params.rows = rows;
    params.x_stride = x_stride;
    params.columns = static_cast<int32_t>(columns);
    params.eps = static_cast<float>(eps);
    params.weight_type = static_cast<uint32_t>(weight_type);
    params.vectors = columns % 8 == 0 && rows_are_vectors(x, type, rows, x_stride, columns) && aligned(grad, 16) &&
                     aligned(weight, 16) && aligned(grad_total, 16) && aligned(grad_x, 16);
    const size_t bytes = row_span(rows, columns, columns, type);
    driver.launch(kOp, *kRows[static_cast<int>(type)], {static_cast<unsigned>(slots), 1, 1}, params, target,
                  {{grad, bytes, Access::kRead},
                   {x, row_span(rows, x_stride, columns, type), Access::kRead},
                   {weight, row_span(1, 0, columns, weight_type), Access::kRead},
                   {grad_total, grad_total != nullptr ? bytes : 0, Access::kRead},
                   {grad_x, bytes, Access::kWrite},
                   {partial, partial_bytes, Access::kWrite}});
  }
  const RmsNormWeightGradParams params{static_cast<const float*>(partial), grad_weight, static_cast<int32_t>(slots),
                                       static_cast<int32_t>(columns), static_cast<uint32_t>(weight_type)};
  const int64_t ctas = (columns + kNormGroupColumns - 1) / kNormGroupColumns;
  driver.launch(
      kOp, kWeight, {static_cast<unsigned>(ctas), 1, 1}, params, target,
      {{partial, partial_bytes, Access::kRead}, {grad_weight, row_span(1, 0, columns, weight_type), Access::kWrite}});
}

}  // namespace dsv3
