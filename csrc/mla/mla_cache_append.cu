// mla_cache_append: each token's latent and rotary key to its slot of the cache.
//
// A float cache takes the bytes as they are. The FP8 format is 512 E4M3 codes, 4 float32 scales (those of
// quantize_1x128, to the bit: quant/encode.cuh) and 64 bfloat16. A slot outside the cache, as -1, is skipped.
//
// Roles     8 warps, one token each; no shared memory, no barrier
// Budget    bytes per token: 1152 read and written (bf16), or 1152 read and 656 written (FP8), once: memory-bound, and
//           at the few tokens of a decoding step bound by the launch
// Accesses  16 bytes a lane; of the FP8 format 8 (codes of bf16) or 4. Rows that are not aligned to such go by 2 bytes.
#include "mla/cache_rows.cuh"
#include "mla/mla_cache_append_params.h"
#include "quant/encode.cuh"

namespace dsv3 {
namespace {

// Where this warp's token goes, nullptr for none.
__device__ __forceinline__ uint8_t* slot_of(const MlaCacheAppendParams& p, uint32_t token) {
  if (token >= p.tokens) return nullptr;
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.places) return nullptr;
  const int64_t page = slot >> p.page_shift;
  return cache_row(p.cache, page, slot - (page << p.page_shift), p.page_stride, p.row_bytes);
}

__device__ __forceinline__ uint32_t token_of_warp() { return blockIdx.x * kCacheTokens + threadIdx.x / 32; }

template <class T, bool kVectors>
__device__ __forceinline__ void append_fp8(const MlaCacheAppendParams& p) {
  constexpr int kVector = 16 / sizeof(T);  // elements of a lane and step
  constexpr int kLanes = 128 / kVector;    // of one block
  constexpr int kSteps = 512 / (32 * kVector);
  const uint32_t token = token_of_warp();
  const int lane = threadIdx.x % 32;
  uint8_t* row = slot_of(p, token);
  if (row == nullptr) return;  // whole warps leave

  const auto* latent = reinterpret_cast<const Bits<T>*>(p.latent + token * p.latent_stride) + lane * kVector;
  uint4 loaded[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) loaded[step] = load<kVectors>(latent + step * 32 * kVector, kVector);
  const auto* rope = reinterpret_cast<const Bits<T>*>(p.rope + token * p.rope_stride) + 2 * lane;
  const uint32_t pair[2] = {rope[0], rope[1]};

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t words[4] = {loaded[step].x, loaded[step].y, loaded[step].z, loaded[step].w};
    float values[kVector];
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = element(words, i, T{});
      amax = ptx::max_nan_f32(amax, fabsf(values[i]));
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, distance));
    }
    const float scale = scale_of(amax, p.pow2_scale != 0);
    const int column = step * 32 * kVector + lane * kVector;
    if (lane % kLanes == 0) reinterpret_cast<float*>(row + kFp8Scales)[column / 128] = scale;
    store<true>(row + column, values, scale, __frcp_rn(scale), kVector);
  }

  uint32_t packed;
  if constexpr (sizeof(T) == 4) {
    packed = ptx::cvt_rn_bf16x2_f32(__uint_as_float(pair[0]), __uint_as_float(pair[1]));
  } else {
    packed = pair[0] | pair[1] << 16;
    if constexpr (std::is_same_v<T, __half>) {
      packed = ptx::cvt_rn_bf16x2_f32(element(&packed, 0, T{}), element(&packed, 1, T{}));
    }
  }
  reinterpret_cast<uint32_t*>(row + kFp8Rope)[lane] = packed;
}

template <class T>
__device__ __forceinline__ void append_fp8(const MlaCacheAppendParams& p) {
  if (p.vectors) {
    append_fp8<T, true>(p);
  } else {
    append_fp8<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_append_copy(const __grid_constant__ dsv3::MlaCacheAppendParams p) {
  const uint32_t token = dsv3::token_of_warp();
  const int lane = threadIdx.x % 32;
  uint8_t* row = dsv3::slot_of(p, token);
  if (row == nullptr) return;
  dsv3::copy_bytes(row, p.latent + token * p.latent_stride, p.latent_bytes, p.vectors, lane);
  dsv3::copy_bytes(row + p.latent_bytes, p.rope + token * p.rope_stride, p.rope_bytes, p.vectors, lane);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_append_fp8_f32(const __grid_constant__ dsv3::MlaCacheAppendParams p) {
  dsv3::append_fp8<float>(p);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_append_fp8_bf16(const __grid_constant__ dsv3::MlaCacheAppendParams p) {
  dsv3::append_fp8<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_append_fp8_f16(const __grid_constant__ dsv3::MlaCacheAppendParams p) {
  dsv3::append_fp8<__half>(p);
}
