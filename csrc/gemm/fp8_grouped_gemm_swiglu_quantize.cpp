// Launcher of fp8_grouped_gemm_swiglu_quantize.
#include "gemm/fp8_grouped_gemm_swiglu_quantize_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_gemm_swiglu_quantize(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b,
                                      const GemmScale& b_scale, const void* offsets, const GemmScale& weights, void* q,
                                      const GemmScale& scale, bool pow2_scale, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_gemm_swiglu_quantize";
  static constexpr const Kernel& kBlock = kernel("fp8_grouped_gemm_swiglu_quantize_block");
  static constexpr const Kernel& kRow = kernel("fp8_grouped_gemm_swiglu_quantize_row");
  static_assert(kBlock.shared_bytes == kSwigluSharedBytes && kRow.shared_bytes == kSwigluSharedBytes &&
                    kBlock.threads == kFp8Threads && kRow.threads == kFp8Threads,
                "what the kernels are made for");
  const int64_t f = b.rows / 2;
  if (a.rows == 0 || f == 0 || b.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  Fp8SwigluParams params{};
  params.a = operand_map(driver, kOp, "a", a, 128);
  params.b = operand_map(driver, kOp, "b", b, 128);
  params.a_scale = scale_view(kOp, "a_scale", a_scale, a.rows);
  params.b_scale = scale_view(kOp, "b_scale", b_scale, b.rows);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.weights = static_cast<const float*>(weights.data);
  params.q = static_cast<uint8_t*>(q);
  params.scale = static_cast<float*>(const_cast<void*>(scale.data));
  params.weight_stride = weights.block_stride;  // one-dimensional
  params.scale_row_stride = scale.row_stride;
  params.scale_block_stride = scale.block_stride;
  params.groups = to_int32(kOp, "G", b.groups);
  params.rows = to_int32(kOp, "S", a.rows);
  params.f = to_int32(kOp, "2 F", b.rows) / 2;
  params.blocks = to_int32(kOp, "K", tiles_along(a.columns, kGemmBlock));
  params.n_tiles = static_cast<int32_t>(tiles_along(f, 128));
  params.vectors = f % 8 == 0 && reinterpret_cast<uintptr_t>(q) % 8 == 0;
  params.pow2_scale = pow2_scale;
  // Where up begins inside a block of scales, a tile of up has two: such scales are copied row by row.
  const bool by_block = params.b_scale.rows_per_scale != 1 && f % 128 == 0;
  // Each group has one ragged tile of rows at most, and no more groups than rows have any.
  const int64_t most_tiles = (a.rows / 128 + std::min(b.groups, a.rows)) * params.n_tiles;
  to_int32(kOp, "tiles of the output", most_tiles);
  const int64_t all = driver.multiprocessors(target), sms = num_sms > 0 ? std::min<int64_t>(num_sms, all) : all;

  const size_t weight_bytes = weights.data != nullptr ? span(1, 0, 1, 0, a.rows, params.weight_stride, 4) : 0;
  driver.launch(kOp, by_block ? kBlock : kRow, {static_cast<unsigned>(std::min(most_tiles, sms)), 1, 1}, params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(b.groups + 1) * 4, Access::kRead},
                 {weights.data, weight_bytes, Access::kRead},
                 {q, static_cast<size_t>(a.rows * f), Access::kWrite},
                 {scale.data, buffer(scale).bytes, Access::kWrite}});
}

}  // namespace dsv3
