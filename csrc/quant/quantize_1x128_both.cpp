// Launcher of quantize_1x128_both. Arguments were checked in Python; here they become a grid and a parameter struct.
#include "quant/launchers.h"
#include "quant/quantize_1x128_both_params.h"
#include "quant/vectors.h"

namespace dsv3 {

void quantize_1x128_both(const void* x, const void* offsets, void* q, void* scale, void* q_t, void* scale_t,
                         void* offsets_t, int64_t tokens, int64_t columns, int64_t width, int64_t groups,
                         int64_t x_stride, int64_t scale_row_stride, int64_t scale_block_stride,
                         int64_t scale_t_row_stride, int64_t scale_t_block_stride, bool pow2_scale, ElementType type,
                         const Target& target) {
  static constexpr const char* kOp = "quantize_1x128_both";
  static constexpr const Kernel* kKernels[] = {&kernel("quantize_1x128_both_f32"), &kernel("quantize_1x128_both_bf16"),
                                               &kernel("quantize_1x128_both_f16")};
  const int64_t blocks = (columns + 127) / 128, blocks_t = width / 128;
  const int64_t chunks = std::max<int64_t>((blocks + kBothBlocks - 1) / kBothBlocks, 1);
  // With offsets one CTA is there in any case: it writes offsets_t.
  const int64_t ctas = std::max<int64_t>(columns == 0 ? 0 : blocks_t * chunks, offsets != nullptr ? 1 : 0);
  if (ctas == 0) return;
  if (ctas > INT32_MAX) throw Error("quantize_1x128_both: x has more elements than a grid covers");
  if (width > INT32_MAX && offsets != nullptr) throw Error("quantize_1x128_both: offsets_t would exceed 32 bits");

  Quantize1x128BothParams params{};
  params.x = x;
  params.q = static_cast<uint8_t*>(q);
  params.scale = static_cast<float*>(scale);
  params.q_t = static_cast<uint8_t*>(q_t);
  params.scale_t = static_cast<float*>(scale_t);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.offsets_t = static_cast<int32_t*>(offsets_t);
  params.tokens = tokens;
  params.columns = columns;
  params.width = width;
  params.x_stride = x_stride;
  params.scale_row_stride = scale_row_stride;
  params.scale_block_stride = scale_block_stride;
  params.scale_t_row_stride = scale_t_row_stride;
  params.scale_t_block_stride = scale_t_block_stride;
  params.groups = static_cast<int32_t>(groups);
  params.chunks = static_cast<uint32_t>(chunks);
  params.vectors = rows_are_vectors(x, type, tokens, x_stride, columns) && columns % 8 == 0 && aligned(q, 8) &&
                   aligned(q_t, 8);  // width is a multiple of 128
  params.pow2_scale = pow2_scale;

  const auto span = [](int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride, int64_t bytes) {
    return static_cast<size_t>(
        rows == 0 || columns == 0 ? 0 : ((rows - 1) * row_stride + (columns - 1) * column_stride + 1) * bytes);
  };
  const size_t offset_bytes = offsets != nullptr ? static_cast<size_t>(groups + 1) * 4 : 0;
  Driver::of(kOp, target)
      .launch(kOp, *kKernels[static_cast<int>(type)], {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{x, span(tokens, x_stride, columns, 1, bytes_of(type)), Access::kRead},
               {offsets, offset_bytes, Access::kRead},
               {q, static_cast<size_t>(tokens * columns), Access::kWrite},
               {scale, span(tokens, scale_row_stride, blocks, scale_block_stride, 4), Access::kWrite},
               {q_t, static_cast<size_t>(columns * width), Access::kWrite},
               {scale_t, span(columns, scale_t_row_stride, blocks_t, scale_t_block_stride, 4), Access::kWrite},
               {offsets_t, offset_bytes, Access::kWrite}});
}

}  // namespace dsv3
