// Launcher of fp8_gemm.
#include "gemm/fp8_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
              const void* bias, bool bias_is_float32, const GemmOutput& out, const GemmChoice& choice,
              const Target& target) {
  static constexpr const char* kOp = "fp8_gemm";
  if (out.rows == 0 || out.columns == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const Fp8Plan plan = plan_launch(driver, Fp8Op::kGemm, 1, a, b, b_scale, out, choice, target);

  Fp8GemmParams params{};
  set_operands(params, driver, kOp, "a", a, a_scale, "b", b, b_scale, out, *plan.kernel);
  params.bias = bias;
  params.bias_is_float32 = bias_is_float32;
  params.m = to_int32(kOp, "M", out.rows);
  params.m_tiles = static_cast<int32_t>(tiles_along(out.rows, plan.kernel->tile.m));
  params.split = static_cast<int32_t>(plan.split);
  to_int32(kOp, "tiles of the output", plan.tiles * plan.split);

  LaunchOptions options;
  options.cluster = static_cast<unsigned>(plan.split * plan.kernel->ctas);
  const Dim3 grid =
      plan.split > 1 ? Dim3{static_cast<unsigned>(plan.tiles * plan.split), 1, 1} : persistent_grid(plan.tiles, plan);
  const size_t bias_bytes = bias != nullptr ? static_cast<size_t>(out.columns) * (bias_is_float32 ? 4 : 2) : 0;
  driver.launch(
      kOp, *plan.kernel->kernel, grid, params, target,
      {buffer(a), buffer(a_scale), buffer(b), buffer(b_scale), {bias, bias_bytes, Access::kRead}, buffer(out)},
      options);
}

}  // namespace dsv3
