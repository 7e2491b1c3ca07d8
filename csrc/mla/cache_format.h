// Rows of a latent cache, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// The FP8 format, in bytes: 512 E4M3 codes, 4 float32 scales of 128 codes each, 64 bfloat16.
constexpr uint32_t kFp8Scales = 512;
constexpr uint32_t kFp8Rope = 528;
constexpr uint32_t kFp8Row = 656;

// Tokens of one CTA where a warp takes one.
constexpr uint32_t kCacheTokens = 8;

}  // namespace dsv3
