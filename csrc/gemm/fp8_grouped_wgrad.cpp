// Launcher of fp8_grouped_wgrad.
#include "gemm/fp8_grouped_wgrad_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_wgrad(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                       const void* offsets, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_wgrad";
  static constexpr const Kernel& kKernel = fp8_kernel("fp8_grouped_wgrad_128x128");
  if (out.rows == 0 || out.columns == 0 || out.groups == 0) return;
  const int64_t tiles = out.groups * gemm_tiles(out.rows) * gemm_tiles(out.columns);
  to_int32(kOp, "tiles of 128 x 128", tiles);

  Driver& driver = Driver::of(kOp, target);
  Fp8GroupedWgradParams params{};
  params.a = operand_map(driver, kOp, "a_t", a);
  params.b = operand_map(driver, kOp, "b_t", b);
  params.a_scale = scale_view(a_scale);
  params.b_scale = scale_view(b_scale);
  params.out = output_view(out);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", out.groups);
  params.m = to_int32(kOp, "M", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "S", gemm_tiles(a.columns));
  params.m_tiles = static_cast<int32_t>(gemm_tiles(out.rows));
  params.n_tiles = static_cast<int32_t>(gemm_tiles(out.columns));

  driver.launch(kOp, kKernel, persistent_grid(driver, target, tiles, num_sms), params, target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(out.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
