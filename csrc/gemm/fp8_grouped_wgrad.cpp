// Launcher of fp8_grouped_wgrad.
#include "gemm/fp8_grouped_wgrad_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_wgrad(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                       const void* offsets, const GemmOutput& out, const GemmChoice& choice, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_wgrad";
  if (out.rows == 0 || out.columns == 0 || out.groups == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const Fp8Plan plan = plan_launch(driver, Fp8Op::kGroupedWgrad, out.groups, a, b, b_scale, out, choice, target);

  Fp8GroupedWgradParams params{};
  set_operands(params, driver, kOp, "a_t", a, a_scale, "b_t", b, b_scale, out, *plan.kernel);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", out.groups);
  params.m = to_int32(kOp, "M", out.rows);
  params.m_tiles = static_cast<int32_t>(tiles_along(out.rows, plan.kernel->tile.m));
  to_int32(kOp, "tiles of the output", plan.tiles);

  driver.launch(kOp, *plan.kernel->kernel, persistent_grid(plan.tiles, plan), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(out.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
