// Launcher of fp8_grouped_gemm.
#include "gemm/fp8_grouped_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                      const void* offsets, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_gemm";
  static constexpr const Kernel& kRow = fp8_kernel("fp8_grouped_gemm_128x128_row", 128, 128);
  static constexpr const Kernel& kBlock = fp8_kernel("fp8_grouped_gemm_128x128_block", 128, 128);
  static constexpr const Kernel& kTall = fp8_kernel("fp8_grouped_gemm_256x128_block", 256, 128);
  if (out.rows == 0 || out.columns == 0 || b.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = sms_of(driver, target, num_sms);
  const int64_t blocks = tiles_along(a.columns, kGemmBlock);
  const bool by_row = b_scale.rows == b.rows;
  // Only the device knows the groups' rows: the choice takes them as equal.
  const TileSize tile = by_row ? TileSize{128, 128}
                               : choose_tile({{128, 128}, {256, 128}}, b.groups, tiles_along(out.rows, b.groups),
                                             out.columns, blocks, out.is_float32 ? 4 : 2, sms);
  const int64_t n_tiles = tiles_along(out.columns, tile.n);
  // Each group has one ragged tile of rows at most, and no more groups than rows have any.
  const int64_t most_tiles = (out.rows / tile.m + std::min(b.groups, out.rows)) * n_tiles;

  Fp8GroupedGemmParams params{};
  params.a = operand_map(driver, kOp, "a", a, tile.m);
  params.b = operand_map(driver, kOp, "b", b, tile.n);
  params.a_scale = scale_view(kOp, "a_scale", a_scale);
  params.b_scale = scale_view(kOp, "b_scale", b_scale);
  params.out = output_view(out);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", b.groups);
  params.rows = to_int32(kOp, "S", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "K", blocks);
  params.n_tiles = static_cast<int32_t>(n_tiles);
  to_int32(kOp, "tiles of the output", most_tiles);

  driver.launch(kOp,
                by_row          ? kRow
                : tile.m == 256 ? kTall
                                : kBlock,
                persistent_grid(most_tiles, sms), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(b.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
