// Launcher of dequantize. Arguments were checked in Python; here they become a grid and a parameter struct.
#include "quant/dequantize_params.h"
#include "quant/launchers.h"
#include "quant/vectors.h"

namespace dsv3 {

void dequantize(const QuantMatrices& q, const QuantMatrices& scale, void* out, bool by_row, ElementType type,
                const Target& target) {
  static constexpr const char* kOp = "dequantize";
  static constexpr const Kernel* kKernels[] = {&kernel("dequantize_f32"), &kernel("dequantize_bf16"),
                                               &kernel("dequantize_f16")};
  const int64_t all = q.matrices * q.rows;
  if (all == 0 || q.columns == 0) return;
  const int64_t bytes = bytes_of(type), vector = 16 / bytes;
  const int64_t chunk = dequantize_columns(static_cast<uint32_t>(bytes));
  const int64_t chunks = (q.columns + chunk - 1) / chunk;
  const int64_t row_blocks = (q.rows + kDequantizeRows - 1) / kDequantizeRows;
  const int64_t ctas = q.matrices * row_blocks * chunks;
  if (ctas > INT32_MAX) throw Error("dequantize: q has more elements than a grid covers");

  DequantizeParams params{};
  params.q = static_cast<const uint8_t*>(q.data);
  params.scale = static_cast<const float*>(scale.data);
  params.out = out;
  params.rows = q.rows;
  params.columns = q.columns;
  params.q_matrix_stride = q.matrix_stride;
  params.q_row_stride = q.row_stride;
  params.scale_matrix_stride = scale.matrix_stride;
  params.scale_row_stride = scale.row_stride;
  params.scale_block_stride = scale.column_stride;
  params.by_row = by_row;
  params.row_blocks = static_cast<uint32_t>(row_blocks);
  params.chunks = static_cast<uint32_t>(chunks);
  params.vectors = aligned(q.data, vector) && (q.rows == 1 || q.row_stride % vector == 0) &&
                   (q.matrices == 1 || q.matrix_stride % vector == 0) && q.columns % vector == 0 && aligned(out, 16);
  const auto span = [](const QuantMatrices& x, int64_t bytes) {
    return static_cast<size_t>((x.matrices - 1) * x.matrix_stride + (x.rows - 1) * x.row_stride +
                               (x.columns - 1) * x.column_stride + 1) *
           bytes;
  };
  Driver::of(kOp, target)
      .launch(kOp, *kKernels[static_cast<int>(type)], {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{q.data, span(q, 1), Access::kRead},
               {scale.data, span(scale, 4), Access::kRead},
               {out, static_cast<size_t>(all * q.columns * bytes), Access::kWrite}});
}

}  // namespace dsv3
