// quantize_1x128_both: x [T, K] float32, bf16 or f16 to e4m3 twice: q [T, K] with a scale per row and 128 columns, and
// q_t [K, T'] with a scale per column and 128 tokens. Tokens come in groups (offsets on the device): each group's
// columns of q_t begin a new block and are padded with zeros.
//
//   scale and codes as quantize_1x128 has them, either way from x itself, so that every backend agrees in every bit
//
// Roles     one CTA of 8 warps per 128 tokens of a group and kBothBlocks times 128 columns. Every warp finds the group
//           by itself: 32 groups at a time, a lane each. A block of 128 x 128 stays in registers: a thread holds 8
//           tokens by 8 columns, a warp 64 tokens (8 lanes) by 32 columns (4 lanes).
// Barriers  per block two __syncthreads: partial maxima to the scales' threads (128 rows and 128 columns, one scale a
//           thread), scales to all. The maxima of the next block are not written before the scales of this one have
//           been waited for, nor its scales before the next one's first barrier.
// Budget    bytes per element: 2 + 2 + 8/128 (bf16, f16) or 4 + 2 + 8/128 (float32), each moved once, and the padding.
//           About 36 instructions per element (SASS), two encodings: at 128 lanes per SM and cycle 3.5 elements, where
//           memory at 3.35 TB/s, 132 SMs and 1.7 GHz delivers 3.7 (bf16) or 2.5 (float32): both bounds all but meet for
//           bf16, and two CTAs share an SM so that one's loads run beside the other's arithmetic.
// Accesses  loads: 4 lanes 64 contiguous bytes of a row (128 of float32); q: 4 lanes 32 contiguous bytes; q_t: 8 lanes
//           64 contiguous bytes, straight from registers, because a thread's tokens are consecutive. Every sector
//           whole. Tensors that are not aligned to such accesses take the scalar ones.
#include "quant/encode.cuh"
#include "quant/quantize_1x128_both_params.h"

namespace dsv3 {
namespace {

// The tokens of one block of q_t.
struct TokenBlock {
  int64_t first;  // token
  int count;      // of them, 128 at most; the others are padding
  bool found;
};

// Block `block` of q_t; the groups in front of it are summed 32 at a time. CTA 0's first warp stores offsets_t on the
// way.
__device__ __forceinline__ TokenBlock find_block(const Quantize1x128BothParams& p, int64_t block) {
  if (p.offsets == nullptr) {
    const int64_t first = 128 * block;
    return {first, static_cast<int>(min(p.tokens - first, static_cast<int64_t>(128))), true};
  }
  const int lane = threadIdx.x % 32;
  const bool writes = blockIdx.x == 0 && threadIdx.x < 32;
  if (writes && lane == 0) p.offsets_t[0] = 0;
  TokenBlock found{0, 0, false};
  int64_t before = 0;  // blocks of the groups looked at
  for (int32_t next = 0; next < p.groups; next += 32) {
    int64_t begin = 0, count = 0;
    if (next + lane < p.groups) {
      // Offsets that no caller may pass stay inside x.
      begin = max(p.offsets[next + lane], 0);
      count = max(min(static_cast<int64_t>(p.offsets[next + lane + 1]), p.tokens) - begin, static_cast<int64_t>(0));
    }
    const int64_t blocks = (count + 127) / 128;
    int64_t end = blocks;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t below = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += below;
    }
    end += before;
    if (writes && next + lane < p.groups) p.offsets_t[next + lane + 1] = static_cast<int32_t>(128 * end);
    const uint32_t beyond = __ballot_sync(~0u, block < end);
    if (beyond != 0 && !found.found) {
      const int owner = __ffs(beyond) - 1;
      const int64_t within = 128 * (block - (end - blocks));
      found.first = __shfl_sync(~0u, begin + within, owner);
      found.count = static_cast<int>(min(__shfl_sync(~0u, count - within, owner), static_cast<int64_t>(128)));
      found.found = true;
      if (!writes) return found;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return found;
}

struct Shared {
  float row_maxima[4][128];  // per 32 columns and row
  float column_maxima[2][128];
  float2 row_scales[128];  // scale and its reciprocal
  float2 column_scales[128];
};

template <class T, bool kVectors>
__device__ __forceinline__ void quantize_block(const Quantize1x128BothParams& p, Shared& shared,
                                               const TokenBlock& tokens, int64_t block_t, int64_t block) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kLoads = 8 / kVector;  // of a thread and row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = 64 * (warp / 4) + 8 * (lane / 4);  // of the block; 8 rows and 8 columns from there on
  const int column = 32 * (warp % 4) + 8 * (lane % 4);
  const int64_t k = 128 * block + column;
  const int rows = min(tokens.count - row, 8), columns = static_cast<int>(min(p.columns - k, static_cast<int64_t>(8)));
  const Bits<T>* x = static_cast<const Bits<T>*>(p.x) + (tokens.first + row) * p.x_stride + k;

  uint4 loaded[8][kLoads];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      loaded[i][j] = load<kVectors>(x + i * p.x_stride + j * kVector, i < rows ? columns - j * kVector : 0);
    }
  }
  const auto unpack_row = [&](int i, float (&values)[8]) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      float part[kVector];
      unpack<T>(loaded[i][j], part);
#pragma unroll
      for (int e = 0; e < kVector; ++e) values[j * kVector + e] = part[e];
    }
  };

  float column_amax[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float values[8], amax = 0.0f;
    unpack_row(i, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      amax = ptx::max_nan_f32(amax, fabsf(values[j]));
      column_amax[j] = ptx::max_nan_f32(column_amax[j], fabsf(values[j]));
    }
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2) {
      amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, distance));
    }
    if (lane % 4 == 0) shared.row_maxima[warp % 4][row + i] = amax;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int distance = 16; distance > 2; distance /= 2) {
      column_amax[j] = ptx::max_nan_f32(column_amax[j], __shfl_xor_sync(~0u, column_amax[j], distance));
    }
    if (lane < 4) shared.column_maxima[warp / 4][column + j] = column_amax[j];
  }
  __syncthreads();

  const int own = threadIdx.x % 128;
  if (threadIdx.x < 128) {
    const float amax = ptx::max_nan_f32(ptx::max_nan_f32(shared.row_maxima[0][own], shared.row_maxima[1][own]),
                                        ptx::max_nan_f32(shared.row_maxima[2][own], shared.row_maxima[3][own]));
    const float scale = scale_of(amax, p.pow2_scale != 0);
    shared.row_scales[own] = make_float2(scale, __frcp_rn(scale));
    if (own < tokens.count) p.scale[(tokens.first + own) * p.scale_row_stride + block * p.scale_block_stride] = scale;
  } else {
    const float amax = ptx::max_nan_f32(shared.column_maxima[0][own], shared.column_maxima[1][own]);
    const float scale = scale_of(amax, p.pow2_scale != 0);
    shared.column_scales[own] = make_float2(scale, __frcp_rn(scale));
    if (128 * block + own < p.columns) {
      p.scale_t[(128 * block + own) * p.scale_t_row_stride + block_t * p.scale_t_block_stride] = scale;
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= rows || columns <= 0) break;
    float values[8];
    unpack_row(i, values);
    const float2 scale = shared.row_scales[row + i];
    store<kVectors>(p.q + (tokens.first + row + i) * p.columns + k, values, scale.x, scale.y, columns);
  }
  uint8_t* q_t = p.q_t + k * p.width + 128 * block_t + row;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= columns) break;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float row_values[8];
      unpack_row(i, row_values);
      values[i] = row_values[j];
    }
    const float2 scale = shared.column_scales[column + j];
    store<kVectors>(q_t + j * p.width, values, scale.x, scale.y, 8);
  }
}

template <class T, bool kVectors>
__device__ __forceinline__ void quantize_blocks(const Quantize1x128BothParams& p, Shared& shared) {
  const int64_t block_t = blockIdx.x / p.chunks;
  const TokenBlock tokens = find_block(p, block_t);
  if (!tokens.found) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * kBothBlocks;
  const int64_t last = min(first + kBothBlocks, (p.columns + 127) / 128);
#pragma unroll 1
  for (int64_t block = first; block < last; ++block) {
    quantize_block<T, kVectors>(p, shared, tokens, block_t, block);
  }
}

template <class T>
__device__ __forceinline__ void quantize(const Quantize1x128BothParams& p) {
  __shared__ Shared shared;
  if (p.vectors) {
    quantize_blocks<T, true>(p, shared);
  } else {
    quantize_blocks<T, false>(p, shared);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kBothThreads, 2)
    quantize_1x128_both_f32(const __grid_constant__ dsv3::Quantize1x128BothParams p) {
  dsv3::quantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kBothThreads, 2)
    quantize_1x128_both_bf16(const __grid_constant__ dsv3::Quantize1x128BothParams p) {
  dsv3::quantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kBothThreads, 2)
    quantize_1x128_both_f16(const __grid_constant__ dsv3::Quantize1x128BothParams p) {
  dsv3::quantize<__half>(p);
}
