// mla_prologue: of each token's [queries' latent | keys' latent | rotary key], in bf16,
//   q      = E4M3 codes of the first part's RMS norm, a scale per 128
//   cache  = the second part's RMS norm and the third part turned by its position's angle, as mla_cache_append writes
//   them
// with the bits of rms_norm_quantize_1x128, rms_norm, rope and mla_cache_append in a row.
//
// Roles      two warps per token, one for the query and one for the key; no shared memory, no barrier
// Budget     bytes per token of DeepSeek-V3: 4224 read, 1584 and 1152 (bf16 cache) or 656 (FP8) written, each once;
//            1152 more with `keys`. A decoding step is bound by the launch: one instead of four.
// Accesses   16 bytes a lane, all loads of a warp before the first is used
#include "mla/cache_rows.cuh"
#include "mla/mla_prologue_params.h"
#include "mla/turn.cuh"
#include "quant/rms_norm.cuh"

namespace dsv3 {
namespace {

// `columns` columns of a row, at most kSteps * 256, 8 a lane and step: loaded, normed and rounded.
template <int kSteps>
__device__ __forceinline__ void norm_part(const void* x, int64_t first, int columns, const void* weight, uint32_t type,
                                          float eps, Eight<__nv_bfloat16> (&part)[kSteps]) {
  static_assert(kSteps <= 8, "a lane keeps each step's sum: the fixed order of row sums");
  const int lane_column = threadIdx.x % 32 * 8;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = lane_column + 256 * s;
    part[s].template load_from<true>(x, first + column, columns - column);
  }
  float squares[1][8] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float values[8];
    part[s].widen(values);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares[0][s] = __fadd_rn(squares[0][s], __fmul_rn(values[i], values[i]));
  }
  float sums[1];
  sum_row<1>(squares, nullptr, sums);
  const float rms = root(sums[0], columns, eps);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = lane_column + 256 * s;
    float values[8], weights[8];
    part[s].widen(values);
    load_weights<true>(weight, type, column, columns - column, weights);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(__fmul_rn(values[i], rms), weights[i]);
    part[s].round(values);
  }
}

// Codes of what norm_part made.
template <int kSteps>
__device__ __forceinline__ void encode_part(const EncodedRow& row, const Eight<__nv_bfloat16> (&part)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float values[8];
    part[s].widen(values);
    encode<true>(row, threadIdx.x % 32 * 8 + 256 * s, values);
  }
}

__device__ __forceinline__ void query(const MlaPrologueParams& p, int64_t token) {
  Eight<__nv_bfloat16> part[8];
  norm_part(p.x, token * p.x_stride, p.rank, p.q_weight, p.q_weight_type, p.eps, part);
  encode_part(
      {p.q + token * p.rank, p.scale + token * p.scale_row_stride, p.scale_block_stride, p.rank, p.pow2_scale != 0},
      part);
}

// A lane has one pair of the rotary key.
__device__ __forceinline__ uint32_t rotary_key(const MlaPrologueParams& p, int64_t token, int lane) {
  const int64_t position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                                 : static_cast<const int32_t*>(p.positions)[token];
  if (position < 0 || position >= p.table_rows) return 0x7FC07FC0;  // NaN, as rope makes it
  const auto* x = static_cast<const __nv_bfloat16*>(p.x) + token * p.x_stride + p.rank + 512 + 2 * lane;
  const float* angles = p.cos_sin + position * p.table_stride + lane;
  __nv_bfloat16 pair[2] = {x[0], x[1]};
  turn(pair[0], pair[1], angles[0], angles[32]);
  return __bfloat16_as_ushort(pair[0]) | static_cast<uint32_t>(__bfloat16_as_ushort(pair[1])) << 16;
}

template <bool kFp8>
__device__ __forceinline__ void key(const MlaPrologueParams& p, int64_t token) {
  const int lane = threadIdx.x % 32;
  const uint32_t rope = rotary_key(p, token, lane);
  Eight<__nv_bfloat16> part[2];
  norm_part(p.x, token * p.x_stride + p.rank, 512, p.kv_weight, p.kv_weight_type, p.eps, part);
  if (p.latent != nullptr) {
#pragma unroll
    for (int s = 0; s < 2; ++s) part[s].template store_to<true>(p.latent, token * 512 + 256 * s + 8 * lane, 8);
    static_cast<uint32_t*>(p.k_rope)[token * 32 + lane] = rope;
  }
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.places) return;
  const int64_t page = slot >> p.page_shift;
  uint8_t* row =
      cache_row(p.cache, page, slot - (page << p.page_shift), p.page_stride, kFp8 ? kFp8Row : uint32_t{1152});
  if (kFp8) {
    encode_part({row, reinterpret_cast<float*>(row + kFp8Scales), 1, 512, p.cache_pow2_scale != 0}, part);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) part[s].template store_to<true>(row, 256 * s + 8 * lane, 8);
  }
  reinterpret_cast<uint32_t*>(row + (kFp8 ? kFp8Rope : 1024))[lane] = rope;
}

template <bool kFp8>
__device__ __forceinline__ void prologue(const MlaPrologueParams& p) {
  const uint32_t warp = threadIdx.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kPrologueTokens + warp / 2;
  if (token >= p.tokens) return;  // whole warps leave
  if (warp % 2 == 0) {
    query(p, token);
  } else {
    key<kFp8>(p, token);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kPrologueThreads)
    mla_prologue_bf16(const __grid_constant__ dsv3::MlaPrologueParams p) {
  dsv3::prologue<false>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kPrologueThreads)
    mla_prologue_fp8(const __grid_constant__ dsv3::MlaPrologueParams p) {
  dsv3::prologue<true>(p);
}
