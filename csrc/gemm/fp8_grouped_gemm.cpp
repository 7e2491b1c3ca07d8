// Launcher of fp8_grouped_gemm.
#include "gemm/fp8_grouped_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_grouped_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
                      const void* offsets, const GemmOutput& out, int num_sms, const Target& target) {
  static constexpr const char* kOp = "fp8_grouped_gemm";
  static constexpr const Kernel& kBlock = fp8_kernel("fp8_grouped_gemm_128x128_block");
  static constexpr const Kernel& kRow = fp8_kernel("fp8_grouped_gemm_128x128_row");
  if (out.rows == 0 || out.columns == 0 || b.groups == 0) return;
  // A group has one ragged tile of rows at most; and no more groups than rows have tiles.
  const int64_t m_tiles = out.rows / kGemmTile + std::min(b.groups, out.rows);
  const int64_t tiles = m_tiles * gemm_tiles(out.columns);
  to_int32(kOp, "tiles of 128 x 128", tiles);

  Driver& driver = Driver::of(kOp, target);
  Fp8GroupedGemmParams params{};
  params.a = operand_map(driver, kOp, "a", a);
  params.b = operand_map(driver, kOp, "b", b);
  params.a_scale = scale_view(a_scale);
  params.b_scale = scale_view(b_scale);
  params.out = output_view(out);
  params.offsets = static_cast<const int32_t*>(offsets);
  params.groups = to_int32(kOp, "G", b.groups);
  params.rows = to_int32(kOp, "S", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "K", gemm_tiles(a.columns));
  params.n_tiles = static_cast<int32_t>(gemm_tiles(out.columns));

  driver.launch(kOp, b_scale.rows == b.rows ? kRow : kBlock, persistent_grid(driver, target, tiles, num_sms), params,
                target,
                {buffer(a),
                 buffer(a_scale),
                 buffer(b),
                 buffer(b_scale),
                 {offsets, static_cast<size_t>(b.groups + 1) * 4, Access::kRead},
                 buffer(out)});
}

}  // namespace dsv3
