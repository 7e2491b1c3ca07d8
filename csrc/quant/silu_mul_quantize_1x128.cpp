// Launcher of silu_mul_quantize_1x128. Arguments were checked in Python; here they become a grid and a parameter
// struct.
#include "quant/launchers.h"
#include "quant/silu_mul_quantize_1x128_params.h"
#include "quant/vectors.h"

namespace dsv3 {

void silu_mul_quantize_1x128(const void* gate_up, const void* weights, void* q, void* scale, int64_t rows,
                             int64_t columns, int64_t x_stride, int64_t weight_stride, int64_t scale_row_stride,
                             int64_t scale_block_stride, bool pow2_scale, ElementType type, const Target& target) {
  static constexpr const char* kOp = "silu_mul_quantize_1x128";
  static constexpr const Kernel* kKernels[] = {&kernel("silu_mul_quantize_1x128_f32"),
                                               &kernel("silu_mul_quantize_1x128_bf16"),
                                               &kernel("silu_mul_quantize_1x128_f16")};
  if (rows == 0 || columns == 0) return;
  const int64_t chunk = silu_columns(static_cast<uint32_t>(bytes_of(type)));
  const int64_t chunks = (columns + chunk - 1) / chunk;
  const int64_t ctas = (rows + kSiluRows - 1) / kSiluRows * chunks;
  if (ctas > INT32_MAX) throw Error("silu_mul_quantize_1x128: gate_up has more elements than a grid covers");

  SiluMulQuantizeParams params{};
  params.gate_up = gate_up;
  params.weights = static_cast<const float*>(weights);
  params.q = static_cast<uint8_t*>(q);
  params.scale = static_cast<float*>(scale);
  params.rows = rows;
  params.columns = columns;
  params.x_stride = x_stride;
  params.weight_stride = weight_stride;
  params.scale_row_stride = scale_row_stride;
  params.scale_block_stride = scale_block_stride;
  params.chunks = static_cast<uint32_t>(chunks);
  params.vectors = rows_are_vectors(gate_up, type, rows, x_stride, columns) && aligned(q, 16 / bytes_of(type));
  params.pow2_scale = pow2_scale;

  const size_t weight_bytes = weights != nullptr ? static_cast<size_t>((rows - 1) * weight_stride + 1) * 4 : 0;
  Driver::of(kOp, target)
      .launch(kOp, *kKernels[static_cast<int>(type)], {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{gate_up, row_span(rows, x_stride, 2 * columns, type), Access::kRead},
               {weights, weight_bytes, Access::kRead},
               {q, static_cast<size_t>(rows * columns), Access::kWrite},
               {scale, scale_span(rows, scale_row_stride, (columns + 127) / 128, scale_block_stride), Access::kWrite}});
}

}  // namespace dsv3
