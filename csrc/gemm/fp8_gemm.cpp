// Launcher of fp8_gemm.
#include "gemm/fp8_gemm_params.h"
#include "gemm/fp8_launch.h"

namespace dsv3 {

void fp8_gemm(const GemmOperand& a, const GemmScale& a_scale, const GemmOperand& b, const GemmScale& b_scale,
              const void* bias, bool bias_is_float32, const GemmOutput& out, bool fixed, int num_sms,
              const Target& target) {
  static constexpr const char* kOp = "fp8_gemm";
  static constexpr const Kernel& kRow = fp8_kernel("fp8_gemm_128x128_row", 128, 128);
  static constexpr const Kernel& kBlock = fp8_kernel("fp8_gemm_128x128_block", 128, 128);
  static constexpr const Kernel& kTall = fp8_kernel("fp8_gemm_256x128_block", 256, 128);
  static constexpr const Kernel& kWide = fp8_kernel("fp8_gemm_128x192_block", 128, 192);
  if (out.rows == 0 || out.columns == 0) return;

  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = sms_of(driver, target, num_sms);
  const int64_t blocks = tiles_along(a.columns, kGemmBlock);
  const bool by_row = b_scale.rows == b.rows;
  // A tile that depends on M might round the products of a row differently for another M.
  const TileSize tile = by_row || fixed ? TileSize{128, 128}
                                        : choose_tile({{128, 128}, {128, 192}, {256, 128}}, 1, out.rows, out.columns,
                                                      blocks, out.is_float32 ? 4 : 2, sms);
  const Kernel& kernel = by_row ? kRow : tile.m == 256 ? kTall : tile.n == 192 ? kWide : kBlock;
  const int64_t m_tiles = tiles_along(out.rows, tile.m), n_tiles = tiles_along(out.columns, tile.n);

  Fp8GemmParams params{};
  params.a = operand_map(driver, kOp, "a", a, tile.m);
  params.b = operand_map(driver, kOp, "b", b, tile.n);
  params.a_scale = scale_view(kOp, "a_scale", a_scale);
  params.b_scale = scale_view(kOp, "b_scale", b_scale);
  params.out = output_view(out);
  params.bias = bias;
  params.bias_is_float32 = bias_is_float32;
  params.m = to_int32(kOp, "M", out.rows);
  params.n = to_int32(kOp, "N", out.columns);
  params.blocks = to_int32(kOp, "K", blocks);
  params.m_tiles = static_cast<int32_t>(m_tiles);
  params.n_tiles = static_cast<int32_t>(n_tiles);
  to_int32(kOp, "tiles of the output", m_tiles * n_tiles);

  const size_t bias_bytes = bias != nullptr ? static_cast<size_t>(out.columns) * (bias_is_float32 ? 4 : 2) : 0;
  driver.launch(
      kOp, kernel, persistent_grid(m_tiles * n_tiles, sms), params, target,
      {buffer(a), buffer(a_scale), buffer(b), buffer(b_scale), {bias, bias_bytes, Access::kRead}, buffer(out)});
}

}  // namespace dsv3
