// Launcher of fp8_grouped_gemm.
#include "gemm/fp8_grouped_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                      const void* offsets, const GemmOutput& out, const GemmChoice& choice, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_gemm";
  if (out.rows == 0 || out.columns == 0 || b.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const Fp8Plan plan = plan_launch(driver, Fp8Op::kGroupedGemm, b.groups, a, b, b_scale, out, choice, target);
  const TileSize tile = plan.kernel->tile;

  Fp8GroupedGemmParams params{};
  set_operands(params, driver, kOp, "a", a, a_scale, "b", b, b_scale, out, *plan.kernel);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", b.groups);
  params.rows = to_int32(kOp, "S", out.rows);
  // Each group has one ragged tile of rows at most, and no more groups than rows have any.
  const int64_t most_tiles = (out.rows / tile.m + std::min(b.groups, out.rows)) * params.n_tiles;
  to_int32(kOp, "tiles of the output", most_tiles);

  driver.launch(kOp, *plan.kernel->kernel, persistent_grid(most_tiles, plan), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(b.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
