// mla_cache_gather: the first tokens of every request, packed; FP8 rows as code * scale rounded to bfloat16.
//
// Rows that no request owns, and those whose table entry leads outside the cache, are zero.
//
// Roles     8 warps, one row each; a warp finds its request by bisection of cu_seqlens. No shared memory, no barrier.
// Budget    bytes per token: 1152 read and written (bf16), or 656 read and 1152 written (FP8), once: memory-bound
// Accesses  16 bytes a lane, loads before stores; rows that are not aligned to such go by 2 bytes
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mla/cache_rows.cuh"
#include "mla/mla_cache_gather_params.h"
#include "ptx/convert.cuh"

namespace dsv3 {
namespace {

__device__ __forceinline__ uint32_t row_of_warp() { return blockIdx.x * kCacheTokens + threadIdx.x / 32; }

// The cache row of output row `row`, nullptr for none.
__device__ __forceinline__ const uint8_t* source_of(const MlaCacheGatherParams& p, uint32_t row) {
  const int32_t token = static_cast<int32_t>(row);
  // The request is the number of ends cu_seqlens[1], cu_seqlens[2], ... that are not past the token.
  uint32_t low = 0, high = p.requests;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle + 1] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == p.requests || token < p.cu_seqlens[low]) return nullptr;
  const uint32_t place = static_cast<uint32_t>(token - p.cu_seqlens[low]);
  const uint32_t column = place >> p.page_shift;
  if (column >= p.table_columns) return nullptr;
  const int64_t page = p.block_table[low * p.table_stride + column];
  if (page < 0 || page >= p.pages) return nullptr;
  return cache_row(p.cache, page, place - (column << p.page_shift), p.page_stride, p.row_bytes);
}

__device__ __forceinline__ uint32_t decode(uint16_t codes, float scale) {
  const uint32_t halves = ptx::cvt_rn_f16x2_e4m3x2(codes);
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  return ptx::cvt_rn_bf16x2_f32(pair.x * scale, pair.y * scale);
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_gather_copy(const __grid_constant__ dsv3::MlaCacheGatherParams p) {
  const uint32_t row = dsv3::row_of_warp();
  const int lane = threadIdx.x % 32;
  if (row >= p.total) return;
  const uint8_t* source = dsv3::source_of(p, row);
  uint8_t* latent = p.latent + static_cast<int64_t>(row) * p.latent_bytes;
  uint8_t* rope = p.rope + static_cast<int64_t>(row) * p.rope_bytes;
  if (source == nullptr) {
    dsv3::zero_bytes(latent, p.latent_bytes, lane);
    dsv3::zero_bytes(rope, p.rope_bytes, lane);
    return;
  }
  dsv3::copy_bytes(latent, source, p.latent_bytes, p.vectors, lane);
  dsv3::copy_bytes(rope, source + p.latent_bytes, p.rope_bytes, p.vectors, lane);
}

extern "C" __global__ void __launch_bounds__(32 * dsv3::kCacheTokens)
    mla_cache_gather_fp8(const __grid_constant__ dsv3::MlaCacheGatherParams p) {
  const uint32_t row = dsv3::row_of_warp();
  const int lane = threadIdx.x % 32;
  if (row >= p.total) return;
  const uint8_t* source = dsv3::source_of(p, row);
  uint4* latent = reinterpret_cast<uint4*>(p.latent) + static_cast<int64_t>(row) * 64;
  uint4* rope = reinterpret_cast<uint4*>(p.rope) + static_cast<int64_t>(row) * 8;
  uint4 low{}, high{}, tail{};
  if (source != nullptr) {
    const uint4 codes = reinterpret_cast<const uint4*>(source)[lane];
    const float scale = reinterpret_cast<const float*>(source + dsv3::kFp8Scales)[lane / 8];
    if (lane < 8) tail = reinterpret_cast<const uint4*>(source + dsv3::kFp8Rope)[lane];
    low.x = dsv3::decode(codes.x, scale), low.y = dsv3::decode(codes.x >> 16, scale);
    low.z = dsv3::decode(codes.y, scale), low.w = dsv3::decode(codes.y >> 16, scale);
    high.x = dsv3::decode(codes.z, scale), high.y = dsv3::decode(codes.z >> 16, scale);
    high.z = dsv3::decode(codes.w, scale), high.w = dsv3::decode(codes.w >> 16, scale);
  }
  latent[2 * lane] = low;
  latent[2 * lane + 1] = high;
  if (lane < 8) rope[lane] = tail;
}
