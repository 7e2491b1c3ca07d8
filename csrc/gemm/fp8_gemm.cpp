// Launcher of fp8_gemm.
#include "gemm/fp8_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
              const void* bias, bool bias_is_float32, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_gemm";
  static constexpr const Kernel& kBlock = fp8_kernel("fp8_gemm_128x128_block");
  static constexpr const Kernel& kRow = fp8_kernel("fp8_gemm_128x128_row");
  if (out.rows == 0 || out.columns == 0) return;
  const int64_t tiles = gemm_tiles(out.rows) * gemm_tiles(out.columns);
  to_int32(kOp, "tiles of 128 x 128", tiles);

  Driver& driver = Driver::of(kOp, target);
  Fp8GemmParams params{};
  params.a = operand_map(driver, kOp, "a", a);
  params.b = operand_map(driver, kOp, "b", b);
  params.a_scale = scale_view(a_scale);
  params.b_scale = scale_view(b_scale);
  params.out = output_view(out);
  params.bias = bias;
  params.bias_is_float32 = bias_is_float32;
  params.m = to_int32(kOp, "M", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "K", gemm_tiles(a.columns));
  params.m_tiles = static_cast<int32_t>(gemm_tiles(out.rows));
  params.n_tiles = static_cast<int32_t>(gemm_tiles(out.columns));

  const size_t bias_bytes = bias != nullptr ? static_cast<size_t>(out.columns) * (bias_is_float32 ? 4 : 2) : 0;
  driver.launch(
      kOp, b_scale.rows == b.rows ? kRow : kBlock, persistent_grid(driver, target, tiles, num_sms), params, target,
      {buffer(a), buffer(a_scale), buffer(b), buffer(b_scale), {bias, bias_bytes, Access::kRead}, buffer(out)});
}

}  // namespace dsv3
