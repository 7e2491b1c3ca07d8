// Launcher of quantize_1x128. Arguments were checked in Python; here they become a grid and a parameter struct.
#include "quant/launchers.h"
#include "quant/quantize_1x128_params.h"
#include "quant/vectors.h"

namespace dsv3 {

void quantize_1x128(const void* x, void* q, void* scale, int64_t rows, int64_t columns, int64_t x_stride,
                    int64_t scale_row_stride, int64_t scale_block_stride, bool pow2_scale, ElementType type,
                    const Target& target) {
  static constexpr const char* kOp = "quantize_1x128";
  static constexpr const Kernel* kRows[] = {&kernel("quantize_1x128_f32"), &kernel("quantize_1x128_bf16"),
                                            &kernel("quantize_1x128_f16")};
  if (rows == 0 || columns == 0) return;
  const int64_t bytes = bytes_of(type);
  const int64_t blocks = (columns + 127) / 128;
  const int64_t chunk = quantize_columns(static_cast<uint32_t>(bytes));
  const int64_t chunks = (columns + chunk - 1) / chunk;
  const int64_t ctas = (rows + kQuantizeRows - 1) / kQuantizeRows * chunks;
  if (ctas > INT32_MAX) throw Error("quantize_1x128: x has more elements than a grid covers");

  Quantize1x128Params params{};
  params.x = x;
  params.q = static_cast<uint8_t*>(q);
  params.scale = static_cast<float*>(scale);
  params.rows = rows;
  params.columns = columns;
  params.x_stride = x_stride;
  params.scale_row_stride = scale_row_stride;
  params.scale_block_stride = scale_block_stride;
  params.chunks = static_cast<uint32_t>(chunks);
  params.vectors = rows_are_vectors(x, type, rows, x_stride, columns) && aligned(q, 16 / bytes);
  params.pow2_scale = pow2_scale;

  Driver::of(kOp, target)
      .launch(kOp, *kRows[static_cast<int>(type)], {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{x, row_span(rows, x_stride, columns, type), Access::kRead},
               {q, static_cast<size_t>(rows * columns), Access::kWrite},
               {scale, scale_span(rows, scale_row_stride, blocks, scale_block_stride), Access::kWrite}});
}

}  // namespace dsv3
