// Launcher of quantize_128x128. Arguments were checked in Python; here they become a grid and a parameter struct.
#include "quant/launchers.h"
#include "quant/quantize_128x128_params.h"
#include "quant/vectors.h"

namespace dsv3 {

void quantize_128x128(const void* w, void* q, void* scale, int64_t matrices, int64_t rows, int64_t columns,
                      int64_t w_matrix_stride, int64_t w_row_stride, int64_t scale_matrix_stride,
                      int64_t scale_row_stride, int64_t scale_column_stride, bool pow2_scale, ElementType type,
                      const Target& target) {
  static constexpr const char* kOp = "quantize_128x128";
  static constexpr const Kernel* kBlocks[] = {&kernel("quantize_128x128_f32"), &kernel("quantize_128x128_bf16"),
                                              &kernel("quantize_128x128_f16")};
  if (matrices == 0 || rows == 0 || columns == 0) return;
  const int64_t bytes = bytes_of(type);
  const int64_t row_blocks = (rows + 127) / 128, column_blocks = (columns + 127) / 128;
  const int64_t ctas = matrices * row_blocks * column_blocks;
  if (ctas > INT32_MAX) throw Error("quantize_128x128: w has more blocks than a grid covers");

  const int64_t vector = 16 / bytes;  // elements per load; as many bytes per store
  Quantize128x128Params params{};
  params.w = w;
  params.q = static_cast<uint8_t*>(q);
  params.scale = static_cast<float*>(scale);
  params.rows = rows;
  params.columns = columns;
  params.w_matrix_stride = w_matrix_stride;
  params.w_row_stride = w_row_stride;
  params.scale_matrix_stride = scale_matrix_stride;
  params.scale_row_stride = scale_row_stride;
  params.scale_column_stride = scale_column_stride;
  params.row_blocks = static_cast<uint32_t>(row_blocks);
  params.column_blocks = static_cast<uint32_t>(column_blocks);
  params.vectors = rows_are_vectors(w, type, rows, w_row_stride, columns) &&
                   (matrices == 1 || w_matrix_stride % vector == 0) && aligned(q, vector);
  params.pow2_scale = pow2_scale;

  const int64_t w_span = (matrices - 1) * w_matrix_stride + (rows - 1) * w_row_stride + columns;
  const int64_t scale_span = (matrices - 1) * scale_matrix_stride + (row_blocks - 1) * scale_row_stride +
                             (column_blocks - 1) * scale_column_stride + 1;
  Driver::of(kOp, target)
      .launch(kOp, *kBlocks[static_cast<int>(type)], {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{w, static_cast<size_t>(w_span * bytes), Access::kRead},
               {q, static_cast<size_t>(matrices * rows * columns), Access::kWrite},
               {scale, static_cast<size_t>(scale_span * 4), Access::kWrite}});
}

}  // namespace dsv3
