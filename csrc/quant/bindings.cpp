#include "host/bindings.h"
#include "quant/launchers.h"

namespace dsv3 {

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
}

}  // namespace dsv3
