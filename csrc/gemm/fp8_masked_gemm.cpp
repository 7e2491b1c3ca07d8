// Launcher of fp8_masked_gemm.
#include "gemm/fp8_launch.h"
#include "gemm/fp8_masked_gemm_params.h"

namespace dsv3 {

void fp8_masked_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                     const void* counts, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_masked_gemm";
  static constexpr const Kernel& kRow = fp8_kernel("fp8_masked_gemm_128x128_row", 128, 128);
  static constexpr const Kernel& kBlock = fp8_kernel("fp8_masked_gemm_128x128_block", 128, 128);
  static constexpr TileSize tile{128, 128};
  if (out.rows == 0 || out.columns == 0 || out.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = sms_of(driver, target, num_sms);
  const int64_t n_tiles = tiles_along(out.columns, tile.n);
  const int64_t most_tiles = out.groups * tiles_along(out.rows, tile.m) * n_tiles;

  Fp8MaskedGemmParams params{};
  params.a = operand_map(driver, kOp, "a", a, tile.m);
  params.b = operand_map(driver, kOp, "b", b, tile.n);
  params.a_scale = scale_view(kOp, "a_scale", a_scale);
  params.b_scale = scale_view(kOp, "b_scale", b_scale);
  params.out = output_view(out);
  params.counts = static_cast<const int32_t*>(counts);
  params.groups = to_int32(kOp, "G", out.groups);
  params.rows = to_int32(kOp, "Tmax", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "K", tiles_along(a.columns, kGemmBlock));
  params.n_tiles = static_cast<int32_t>(n_tiles);
  to_int32(kOp, "tiles of the output", most_tiles);

  driver.launch(kOp, b_scale.rows == b.rows ? kRow : kBlock, persistent_grid(most_tiles, sms), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {counts, static_cast<size_t>(out.groups) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
