// moe_permute: tokens copied to their experts, sorted by expert and then by choice; two launches.
//
// Place     one CTA of 1024 threads per 1024 choices. Every CTA counts all choices by expert, and those before its own
//           separately: with offsets from a scan over the experts it knows where its own begin, and waits for nobody.
//           (It reads 4 bytes per choice for that: 3% of what the copy of a choice's row moves at 7168 columns when
//           there are 32768 tokens, which is why there is no third launch that counts.) Ranks within the CTA: lanes
//           with the same expert by match, warps one after the other.
// Copy      one CTA of 256 threads per token: its row is read once and written to each of its places; before those, one
//           CTA per expert that writes zeros to the padding at the end of the expert's segment.
// Barriers  place: __syncthreads, 32 of them while the warps take turns; copy: none
// Budget    place: 4 to 8 bytes read per choice and CTA, 8 written per choice. Copy, per choice: row bytes written, and
//           row bytes / K read. Memory-bound.
// Accesses  copy: 16 bytes a lane, four loads in flight before the first store; rows that are not aligned to them go
//           byte by byte.
// Order     counts are sums of integers, ranks follow the order of choices: the same result every time.
#include "moe/moe_permute_params.h"

namespace dsv3 {
namespace {

// -1 for what is no expert.
__device__ __forceinline__ int expert_of(const MoePlaceParams& p, int choice) {
  const int64_t at = choice / p.choices * p.token_stride + choice % p.choices * p.choice_stride;
  const int64_t expert =
      p.is_int64 ? static_cast<const int64_t*>(p.experts)[at] : static_cast<const int32_t*>(p.experts)[at];
  return expert >= 0 && expert < p.num_experts ? static_cast<int>(expert) : -1;
}

// Inclusive sum over the threads of a CTA, in their order.
__device__ __forceinline__ int scan(int value, int* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += below;
  }
  if (lane == 31) shared[warp] = value;
  __syncthreads();
  for (int other = 0; other < warp; ++other) value += shared[other];
  return value;
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kPlaceThreads)
    moe_permute_place(const __grid_constant__ dsv3::MoePlaceParams p) {
  using namespace dsv3;
  static_assert(kPlaceMostExperts <= kPlaceThreads, "a thread per expert");
  __shared__ int counts[kPlaceMostExperts], places[kPlaceMostExperts], sums[32], used;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int all = p.tokens * p.choices, first = blockIdx.x * kPlaceThreads;
  counts[thread] = 0;
  places[thread] = 0;
  __syncthreads();
#pragma unroll 4
  for (int choice = thread; choice < all; choice += kPlaceThreads) {
    const int expert = expert_of(p, choice);
    if (expert < 0) continue;
    atomicAdd(&counts[expert], 1);
    if (choice < first) atomicAdd(&places[expert], 1);
  }
  __syncthreads();

  const int count = counts[thread];
  const int segment = (count + p.alignment - 1) / p.alignment * p.alignment;
  const int end = scan(segment, sums), begin = end - segment;
  places[thread] += begin;
  if (thread < p.num_experts) {
    if (blockIdx.x == 0) {
      p.counts[thread] = count;
      p.offsets[thread + 1] = end;
      if (thread == 0) p.offsets[0] = 0;
    }
    if (thread % gridDim.x == blockIdx.x) {
      for (int row = begin + count; row < end; ++row) p.source[row] = -1;
    }
  }
  if (thread == kPlaceThreads - 1) used = end;  // of the last segment: experts that are not there have none
  __syncthreads();
  for (int row = used + first + thread; row < p.rows; row += gridDim.x * kPlaceThreads) p.source[row] = -1;

  const int choice = first + thread;
  const int expert = choice < all ? expert_of(p, choice) : -1;
  const uint32_t same = __match_any_sync(~0u, expert);
  const int leader = __ffs(same) - 1;
  int place = 0;
  for (int turn = 0; turn < static_cast<int>(kPlaceThreads / 32); ++turn) {
    if (warp == turn && lane == leader && expert >= 0) {
      place = places[expert];
      places[expert] = place + __popc(same);
    }
    __syncthreads();
  }
  const int row = __shfl_sync(~0u, place, leader) + __popc(same & ((1u << lane) - 1));
  if (choice >= all) return;
  p.row_of[choice] = expert >= 0 ? row : -1;
  if (expert >= 0) p.source[row] = choice;
}

namespace dsv3 {
namespace {

template <class Unit>
__device__ __forceinline__ void copy(const MoeCopyParams& p) {
  constexpr int kChoices = 8, kLoads = 4;
  const int64_t units = p.row_bytes / sizeof(Unit);
  const int thread = threadIdx.x;
  if (static_cast<int>(blockIdx.x) < p.padded) {
    const int expert = blockIdx.x;
    for (int64_t row = p.offsets[expert] + p.counts[expert]; row < p.offsets[expert + 1]; ++row) {
      Unit* to = reinterpret_cast<Unit*>(p.rows) + row * units;
      for (int64_t at = thread; at < units; at += kCopyThreads) to[at] = Unit{};
      for (int block = thread; block < p.blocks; block += kCopyThreads) {
        p.row_scale[row * p.row_scale_row_stride + block * p.row_scale_block_stride] = 0.0f;
      }
    }
    return;
  }
  const int64_t token = blockIdx.x - p.padded;
  const Unit* from = reinterpret_cast<const Unit*>(p.x + token * p.x_stride);
  for (int done = 0; done < p.choices; done += kChoices) {
    int64_t rows[kChoices];
#pragma unroll
    for (int k = 0; k < kChoices; ++k) {
      rows[k] = done + k < p.choices ? p.row_of[token * p.choices + done + k] : -1;
    }
    for (int64_t first = thread; first < units; first += kLoads * kCopyThreads) {
      Unit loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t at = first + i * kCopyThreads;
        loaded[i] = at < units ? from[at] : Unit{};
      }
#pragma unroll
      for (int k = 0; k < kChoices; ++k) {
        if (rows[k] < 0) continue;
        Unit* to = reinterpret_cast<Unit*>(p.rows) + rows[k] * units;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int64_t at = first + i * kCopyThreads;
          if (at < units) to[at] = loaded[i];
        }
      }
    }
    for (int block = thread; block < p.blocks; block += kCopyThreads) {
      const float scale = p.scale[token * p.scale_row_stride + block * p.scale_block_stride];
#pragma unroll
      for (int k = 0; k < kChoices; ++k) {
        if (rows[k] >= 0) p.row_scale[rows[k] * p.row_scale_row_stride + block * p.row_scale_block_stride] = scale;
      }
    }
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kCopyThreads)
    moe_permute_copy_vectors(const __grid_constant__ dsv3::MoeCopyParams p) {
  dsv3::copy<uint4>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kCopyThreads)
    moe_permute_copy_bytes(const __grid_constant__ dsv3::MoeCopyParams p) {
  dsv3::copy<uint8_t>(p);
}
