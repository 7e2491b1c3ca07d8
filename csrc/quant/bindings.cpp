#include "host/bindings.h"
#include "quant/launchers.h"

namespace dsv3 {

namespace {

QuantMatrices matrices(py::handle argument) {
  const TensorArgument t = tensor(argument);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], t.strides[3]};
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def(
      "quantize_1x128",
      [](uintptr_t x, uintptr_t q, uintptr_t scale, int64_t rows, int64_t columns, int64_t x_stride,
         int64_t scale_row_stride, int64_t scale_block_stride, bool pow2_scale, int type, int device,
         uintptr_t stream) {
        quantize_1x128(pointer(x), pointer(q), pointer(scale), rows, columns, x_stride, scale_row_stride,
                       scale_block_stride, pow2_scale, static_cast<ElementType>(type), {device, stream});
      },
      Unlocked());
  m.def(
      "quantize_128x128",
      [](uintptr_t w, uintptr_t q, uintptr_t scale, int64_t matrices, int64_t rows, int64_t columns,
         int64_t w_matrix_stride, int64_t w_row_stride, int64_t scale_matrix_stride, int64_t scale_row_stride,
         int64_t scale_column_stride, bool pow2_scale, int type, int device, uintptr_t stream) {
        quantize_128x128(pointer(w), pointer(q), pointer(scale), matrices, rows, columns, w_matrix_stride, w_row_stride,
                         scale_matrix_stride, scale_row_stride, scale_column_stride, pow2_scale,
                         static_cast<ElementType>(type), {device, stream});
      },
      Unlocked());
  m.def(
      "quantize_1x128_both",
      [](uintptr_t x, uintptr_t offsets, uintptr_t q, uintptr_t scale, uintptr_t q_t, uintptr_t scale_t,
         uintptr_t offsets_t, int64_t tokens, int64_t columns, int64_t width, int64_t groups, int64_t x_stride,
         int64_t scale_row_stride, int64_t scale_block_stride, int64_t scale_t_row_stride, int64_t scale_t_block_stride,
         bool pow2_scale, int type, int device, uintptr_t stream) {
        quantize_1x128_both(pointer(x), pointer(offsets), pointer(q), pointer(scale), pointer(q_t), pointer(scale_t),
                            pointer(offsets_t), tokens, columns, width, groups, x_stride, scale_row_stride,
                            scale_block_stride, scale_t_row_stride, scale_t_block_stride, pow2_scale,
                            static_cast<ElementType>(type), {device, stream});
      },
      Unlocked());
  m.def(
      "silu_mul_quantize_1x128",
      [](uintptr_t gate_up, uintptr_t weights, uintptr_t q, uintptr_t scale, int64_t rows, int64_t columns,
         int64_t x_stride, int64_t weight_stride, int64_t scale_row_stride, int64_t scale_block_stride, bool pow2_scale,
         int type, int device, uintptr_t stream) {
        silu_mul_quantize_1x128(pointer(gate_up), pointer(weights), pointer(q), pointer(scale), rows, columns, x_stride,
                                weight_stride, scale_row_stride, scale_block_stride, pow2_scale,
                                static_cast<ElementType>(type), {device, stream});
      },
      Unlocked());
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t normed, uintptr_t total, int64_t rows,
         int64_t columns, int64_t x_stride, int64_t residual_stride, double eps, int type, int weight_type, int device,
         uintptr_t stream) {
        rms_norm({pointer(x), pointer(residual), pointer(weight), pointer(normed), pointer(total), nullptr, nullptr,
                  rows, columns, x_stride, residual_stride, 0, 0, eps, false, static_cast<ElementType>(type),
                  static_cast<ElementType>(weight_type)},
                 {device, stream});
      },
      Unlocked());
  m.def(
      "rms_norm_quantize_1x128",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t normed, uintptr_t total, uintptr_t q,
         uintptr_t scale, int64_t rows, int64_t columns, int64_t x_stride, int64_t residual_stride,
         int64_t scale_row_stride, int64_t scale_block_stride, double eps, bool pow2_scale, int type, int weight_type,
         int device, uintptr_t stream) {
        rms_norm_quantize_1x128(
            {pointer(x), pointer(residual), pointer(weight), pointer(normed), pointer(total), pointer(q),
             pointer(scale), rows, columns, x_stride, residual_stride, scale_row_stride, scale_block_stride, eps,
             pow2_scale, static_cast<ElementType>(type), static_cast<ElementType>(weight_type)},
            {device, stream});
      },
      Unlocked());
  m.def(
      "rms_norm_backward",
      [](uintptr_t grad, uintptr_t x, uintptr_t weight, uintptr_t grad_total, uintptr_t grad_x, uintptr_t grad_weight,
         uintptr_t partial, int64_t rows, int64_t columns, int64_t x_stride, double eps, int type, int weight_type,
         int device, uintptr_t stream) {
        rms_norm_backward(pointer(grad), pointer(x), pointer(weight), pointer(grad_total), pointer(grad_x),
                          pointer(grad_weight), pointer(partial), rows, columns, x_stride, eps,
                          static_cast<ElementType>(type), static_cast<ElementType>(weight_type), {device, stream});
      },
      Unlocked());
  m.def("dequantize",
        [](py::handle q, py::handle scale, uintptr_t out, bool by_row, int type, int device, uintptr_t stream) {
          const QuantMatrices codes = matrices(q), scales = matrices(scale);
          const py::gil_scoped_release unlocked;
          dequantize(codes, scales, pointer(out), by_row, static_cast<ElementType>(type), {device, stream});
        });
}

}  // namespace dsv3
