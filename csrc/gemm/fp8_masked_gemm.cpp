// Launcher of fp8_masked_gemm.
#include "gemm/fp8_grouped_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_masked_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                     const void* counts, const GemmOutput& out, const GemmChoice& choice, const Target& target) {
  static constexpr const char* kOp = "fp8_masked_gemm";
  if (out.rows == 0 || out.columns == 0 || out.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const Fp8Plan plan = plan_launch(driver, Fp8Op::kMaskedGemm, out.groups, a, b, b_scale, out, choice, target);
  const TileSize tile = plan.kernel->tile;

  Fp8GroupedGemmParams params{};
  set_operands(params, driver, kOp, "a", a, a_scale, "b", b, b_scale, out, *plan.kernel);
  params.offsets = static_cast<const int32_t*>(counts);
  params.groups = to_int32(kOp, "G", out.groups);
  params.rows = to_int32(kOp, "Tmax", out.rows);
  const int64_t most_tiles = out.groups * tiles_along(out.rows, tile.m) * params.n_tiles;
  to_int32(kOp, "tiles of the output", most_tiles);

  driver.launch(kOp, *plan.kernel->kernel, persistent_grid(most_tiles, plan), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {counts, static_cast<size_t>(out.groups) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
