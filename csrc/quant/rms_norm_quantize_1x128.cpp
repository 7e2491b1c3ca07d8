// Launcher of rms_norm_quantize_1x128.
#include "quant/rms_norm_launch.h"

namespace dsv3 {

void rms_norm_quantize_1x128(const NormArguments& arguments, const Target& target) {
  static constexpr const Kernel* kWarp[] = {&kernel("rms_norm_quantize_1x128_warp_f32"),
                                            &kernel("rms_norm_quantize_1x128_warp_bf16"),
                                            &kernel("rms_norm_quantize_1x128_warp_f16")};
  static constexpr const Kernel* kRow[] = {&kernel("rms_norm_quantize_1x128_row_f32"),
                                           &kernel("rms_norm_quantize_1x128_row_bf16"),
                                           &kernel("rms_norm_quantize_1x128_row_f16")};
  const int type = static_cast<int>(arguments.type);
  launch_norm("rms_norm_quantize_1x128", *kWarp[type], *kRow[type], arguments, target);
}

}  // namespace dsv3
