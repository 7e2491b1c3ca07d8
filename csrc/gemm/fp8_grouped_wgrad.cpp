// Launcher of fp8_grouped_wgrad.
#include "gemm/fp8_grouped_wgrad_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_wgrad(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                       const void* offsets, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_wgrad";
  static constexpr const Kernel& kSquare = fp8_kernel("fp8_grouped_wgrad_128x128", 128, 128);
  static constexpr const Kernel& kTall = fp8_kernel("fp8_grouped_wgrad_256x128", 256, 128);
  if (out.rows == 0 || out.columns == 0 || out.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = sms_of(driver, target, num_sms);
  const int64_t blocks = tiles_along(a.columns, kGemmBlock);
  // Only the device knows the groups' columns: the choice takes them as equal.
  const TileSize tile = choose_tile({{128, 128}, {256, 128}}, out.groups, out.rows, out.columns,
                                    tiles_along(blocks, out.groups), out.is_float32 ? 4 : 2, sms);
  const int64_t m_tiles = tiles_along(out.rows, tile.m), n_tiles = tiles_along(out.columns, tile.n);

  Fp8GroupedWgradParams params{};
  params.a = operand_map(driver, kOp, "a_t", a, tile.m);
  params.b = operand_map(driver, kOp, "b_t", b, tile.n);
  params.a_scale = scale_view(kOp, "a_scale", a_scale);
  params.b_scale = scale_view(kOp, "b_scale", b_scale);
  params.out = output_view(out);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", out.groups);
  params.m = to_int32(kOp, "M", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "S", blocks);
  params.m_tiles = static_cast<int32_t>(m_tiles);
  params.n_tiles = static_cast<int32_t>(n_tiles);
  to_int32(kOp, "tiles of the output", out.groups * m_tiles * n_tiles);

  driver.launch(kOp, tile.m == 256 ? kTall : kSquare, persistent_grid(out.groups * m_tiles * n_tiles, sms), params,
                target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(out.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
