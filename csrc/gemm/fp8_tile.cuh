// A 128x128 output tile of D = A * B^T in E4M3, promoted to float32 every 128 of K: what the FP8 GEMM kernels share.
//
// Roles      warp 0        tensor copies of A and B (one elected lane)
//            warp 1        copies of the scales, 4 bytes a lane: any strides, no relayout before the GEMM
//            warps 2, 3    leave at once
//            warps 4..11   two consumer warpgroups of 64 rows each: wgmma, promotion, output
// Barriers   full[s]       1 arrival with 32768 bytes (warp 0) + 32 arrivals as their copies land (warp 1's lanes)
//            empty[s]      8 arrivals, one per consumer warp, when it no longer reads the stage
//            Both sides walk the ring with a Slot that lives as long as the CTA, across tiles. No named barriers.
// Registers  40 for the producers, 232 for the consumers (64 results, 2 x 64 partial sums of two k-blocks)
// Shared     6 stages of A 16384, B 16384, scales 512 + 512; 8 slabs of 2048 for the output: 219232 bytes
// Cycles     per k-block: 512 on the tensor cores; wgmma reads 48 KB of shared memory and the copies write 32 KB: 640
//            at 128 bytes a cycle, which is the bound; 16384 FFMA take 128 of each quarter's issue slots
// Overlap    a warpgroup promotes one k-block while its next one multiplies, four k-blocks per iteration: a partial sum
//            in flight across the loop's back edge would make ptxas serialise every wgmma (C7514)
#pragma once

#include <cuda_bf16.h>

#include "gemm/fp8_params.h"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {

constexpr int kTileM = 128;
constexpr int kTileN = 128;
constexpr int kTileK = 128;
constexpr int kStages = 6;
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 128 + 32 * kConsumerWarps;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kBlocksPerIteration = 4;

// Whether B has a scale per 128 rows (weights) or per row (the other operand of a weight gradient).
enum class BScale { kBlock, kRow };

// Byte offsets from the start of dynamic shared memory.
constexpr uint32_t kOperandBytes = kTileM * kTileK;
constexpr uint32_t kScaleBytes = kTileM * sizeof(float);
constexpr uint32_t kSlabBytes = 16 * 128;  // 16 rows of 64 bfloat16
constexpr uint32_t kOffsetA = 0;
constexpr uint32_t kOffsetB = kOffsetA + kStages * kOperandBytes;
constexpr uint32_t kOffsetSlab = kOffsetB + kStages * kOperandBytes;
constexpr uint32_t kOffsetScaleA = kOffsetSlab + kConsumerWarps * kSlabBytes;
constexpr uint32_t kOffsetScaleB = kOffsetScaleA + kStages * kScaleBytes;
constexpr uint32_t kOffsetFull = kOffsetScaleB + kStages * kScaleBytes;
constexpr uint32_t kOffsetEmpty = kOffsetFull + 8 * kStages;
constexpr uint32_t kSharedBytes = kOffsetEmpty + 8 * kStages;

static_assert(kTileM == kTileN, "A and B have the same tile, stage offset and scale slots");
static_assert(kOperandBytes % 1024 == 0,
              "the 128-byte swizzle repeats every 1024 bytes; descriptors have no base offset");
static_assert(kTileK == 128, "one k-block is a row of 128 bytes: the swizzle's span, and one scale");
static_assert(kSharedBytes == kFp8SharedBytes && kThreads == kFp8Threads, "what the launchers ask for");
static_assert(kSharedBytes <= 232448, "shared memory of one CTA on sm_90");
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg.inc would wait for ever");

// A place in the ring. The producers wait for a stage's parity ^ 1, so that a fresh stage counts as empty.
struct Slot {
  uint32_t stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tile's place in its matrix: bands of 8 rows of tiles, each walked column by column, so that the CTAs that run at
// the same time share few rows of A and few of B in L2.
struct TilePlace {
  int m, n;  // first row and column
};
__device__ __forceinline__ TilePlace rasterise(int tile, int m_tiles, int n_tiles) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * n_tiles);
  const int height = min(kBand, m_tiles - band * kBand);
  const int within = tile - band * kBand * n_tiles;
  return {(band * kBand + within % height) * kTileM, within / height * kTileN};
}

// Role of this warp, in a register that is the same for all its lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
}

// First thing in the kernel, by all threads. Without k-blocks there are no tensor maps.
__device__ __forceinline__ void initialise_ring(uint32_t shared, const TensorMap* a, const TensorMap* b, int blocks) {
  if (threadIdx.x == 0) {
    if (blocks > 0) {
      ptx::prefetch_tensormap(a);
      ptx::prefetch_tensormap(b);
    }
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(shared + kOffsetFull + 8 * s, 1 + 32);
      ptx::mbarrier_init(shared + kOffsetEmpty + 8 * s, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// Where an operand's tile lies in its tensor map [planes, rows, K].
struct OperandPlace {
  int row, plane;
};

// Warp 0, one lane: `blocks` k-blocks of A and B from `first_block` on. Boxes that hang over an edge are filled with
// zeros and count in full.
__device__ __forceinline__ void load_operands(uint32_t shared, Slot& slot, const TensorMap* a, OperandPlace a_place,
                                              const TensorMap* b, OperandPlace b_place, int first_block, int blocks) {
  for (int block = first_block; block < first_block + blocks; ++block) {
    const uint32_t full = shared + kOffsetFull + 8 * slot.stage;
    ptx::mbarrier_wait_parity(shared + kOffsetEmpty + 8 * slot.stage, slot.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, 2 * kOperandBytes);
    ptx::cp_async_bulk_tensor_3d_g2s(shared + kOffsetA + slot.stage * kOperandBytes, a, full, block * kTileK,
                                     a_place.row, a_place.plane);
    ptx::cp_async_bulk_tensor_3d_g2s(shared + kOffsetB + slot.stage * kOperandBytes, b, full, block * kTileK,
                                     b_place.row, b_place.plane);
    slot.advance();
  }
}

// Warp 1: the scales of the same k-blocks. `rows` and `columns` count what is left of the matrix from the tile's corner
// on: a row beyond takes the last one's scale, since its results are not stored.
template <BScale kScale>
__device__ __forceinline__ void load_scales(uint32_t shared, Slot& slot, const ScaleView& a, int group_a, int row,
                                            int rows, const ScaleView& b, int group_b, int column, int columns,
                                            int first_block, int blocks) {
  const int lane = threadIdx.x % 32;
  const float *a_scale[4], *b_scale[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a_scale[i] = a.data + group_a * a.group_stride + (row + min(lane + 32 * i, rows - 1)) * a.row_stride +
                 first_block * a.block_stride;
    b_scale[i] = b.data + group_b * b.group_stride + first_block * b.block_stride +
                 (kScale == BScale::kRow ? column + min(lane + 32 * i, columns - 1) : column / 128) * b.row_stride;
  }
  for (int block = 0; block < blocks; ++block) {
    ptx::mbarrier_wait_parity(shared + kOffsetEmpty + 8 * slot.stage, slot.parity ^ 1);
    const uint32_t a_slot = shared + kOffsetScaleA + slot.stage * kScaleBytes + 4 * lane;
    const uint32_t b_slot = shared + kOffsetScaleB + slot.stage * kScaleBytes + 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::cp_async_ca_4(a_slot + 128 * i, a_scale[i]);
      a_scale[i] += a.block_stride;
    }
    if (kScale == BScale::kRow) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::cp_async_ca_4(b_slot + 128 * i, b_scale[i]);
        b_scale[i] += b.block_stride;
      }
    } else {
      if (lane == 0) ptx::cp_async_ca_4(b_slot, b_scale[0]);
      b_scale[0] += b.block_stride;
      __syncwarp();
    }
    ptx::cp_async_mbarrier_arrive_noinc(shared + kOffsetFull + 8 * slot.stage);
    slot.advance();
  }
}

// A consumer thread's place in the tile. Accumulator i of a thread is element
// (row() + 8 * (i >> 1 & 1), 8 * (i >> 2) + column() + (i & 1)) of the tile (PTX ISA, wgmma, register fragments of D).
struct Consumer {
  int warpgroup, warp, lane;  // 0..1, 0..3, 0..31
  __device__ __forceinline__ Consumer(int warp_of_cta)
      : warpgroup(warp_of_cta / 4 - 1), warp(warp_of_cta % 4), lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int first_row() const { return 64 * warpgroup + 16 * warp; }
  __device__ __forceinline__ int row() const { return first_row() + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
};

__device__ __forceinline__ float ld_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float2 ld_shared_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

// A k-block that multiplies: its stage, and the scales of this thread's two rows.
struct Running {
  uint32_t stage;
  float scale[2];
};

// Waits for the next stage and starts its multiplication into d.
template <BScale kScale>
__device__ __forceinline__ Running start_block(uint32_t shared, Slot& slot, const Consumer& me, float (&d)[64]) {
  ptx::mbarrier_wait_parity(shared + kOffsetFull + 8 * slot.stage, slot.parity);
  Running running;
  running.stage = slot.stage;
  const uint32_t scales = shared + kOffsetScaleA + slot.stage * kScaleBytes + 4 * me.row();
  running.scale[0] = ld_shared(scales);
  running.scale[1] = ld_shared(scales + 4 * 8);
  if (kScale == BScale::kBlock) {
    const float b_scale = ld_shared(shared + kOffsetScaleB + slot.stage * kScaleBytes);
    running.scale[0] *= b_scale;
    running.scale[1] *= b_scale;
  }
  const uint32_t a_tile = shared + kOffsetA + slot.stage * kOperandBytes + me.warpgroup * 64 * kTileK;
  const uint32_t b_tile = shared + kOffsetB + slot.stage * kOperandBytes;
  const uint64_t a = ptx::matrix_descriptor(a_tile, 16, 8 * kTileK, ptx::Swizzle::k128B);
  const uint64_t b = ptx::matrix_descriptor(b_tile, 16, 8 * kTileK, ptx::Swizzle::k128B);
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileK / 32; ++k) ptx::wgmma_e4m3_ss(d, a + 2 * k, b + 2 * k, k != 0);  // 2: 32 bytes along K
  ptx::wgmma_commit_group();
  ptx::pin(d);
  slot.advance();
  return running;
}

__device__ __forceinline__ void release(uint32_t shared, uint32_t stage, const Consumer& me) {
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(shared + kOffsetEmpty + 8 * stage);
}

// Promotes a k-block that has been waited for: results += partial * (a_scale * b_scale).
template <BScale kScale>
__device__ __forceinline__ void promote_block(uint32_t shared, const Running& running, const Consumer& me,
                                              float (&d)[64], float (&results)[64]) {
  ptx::pin(d);
  if (kScale == BScale::kBlock) {
    release(shared, running.stage, me);  // its operands are multiplied and its scales in registers
#pragma unroll
    for (int i = 0; i < 64; ++i) results[i] = fmaf(running.scale[i >> 1 & 1], d[i], results[i]);
  } else {
    const uint32_t scales = shared + kOffsetScaleB + running.stage * kScaleBytes + 4 * me.column();
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      const float2 b_scale = ld_shared_pair(scales + 4 * 2 * i);
      results[i + 0] = fmaf(running.scale[0] * b_scale.x, d[i + 0], results[i + 0]);
      results[i + 1] = fmaf(running.scale[0] * b_scale.y, d[i + 1], results[i + 1]);
      results[i + 2] = fmaf(running.scale[1] * b_scale.x, d[i + 2], results[i + 2]);
      results[i + 3] = fmaf(running.scale[1] * b_scale.y, d[i + 3], results[i + 3]);
    }
    release(shared, running.stage, me);
  }
}

// A consumer warpgroup's 64 rows of the tile, over `blocks` k-blocks (none: zeros).
template <BScale kScale>
__device__ __forceinline__ void multiply_tile(uint32_t shared, Slot& slot, const Consumer& me, int blocks,
                                              float (&results)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) results[i] = 0.0f;
  int block = 0;
  for (; block + kBlocksPerIteration <= blocks; block += kBlocksPerIteration) {
    float d[2][64];
    Running running[2];
    running[0] = start_block<kScale>(shared, slot, me, d[0]);
#pragma unroll
    for (int i = 1; i < kBlocksPerIteration; ++i) {
      running[i % 2] = start_block<kScale>(shared, slot, me, d[i % 2]);
      ptx::wgmma_wait_group<1>();
      promote_block<kScale>(shared, running[(i - 1) % 2], me, d[(i - 1) % 2], results);
    }
    ptx::wgmma_wait_group<0>();
    constexpr int kLast = (kBlocksPerIteration - 1) % 2;
    promote_block<kScale>(shared, running[kLast], me, d[kLast], results);
  }
  for (; block < blocks; ++block) {
    float d[64];
    const Running running = start_block<kScale>(shared, slot, me, d);
    ptx::wgmma_wait_group<0>();
    promote_block<kScale>(shared, running, me, d, results);
  }
}

// Output. Every store stops at the tile's last row and column, so that a tile may end inside another group's rows.

template <class T>
struct Pair;
template <>
struct Pair<float> {
  using Type = float2;
  static __device__ __forceinline__ float2 widen(float2 pair) { return pair; }
  static __device__ __forceinline__ float2 round(float x, float y) { return make_float2(x, y); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
  static __device__ __forceinline__ __nv_bfloat162 round(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

// visit(i, address): accumulators i and i + 1 of this thread belong at address[0] and address[1].
template <class T, class Visit>
__device__ __forceinline__ void for_each_pair(const Consumer& me, T* corner, int64_t row_stride, int rows, int columns,
                                              Visit visit) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = me.row() + 8 * half;
    if (row >= rows) continue;
    T* address = corner + row * row_stride + me.column();
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) {
      if (8 * (i >> 2) < columns) visit(i, address + 8 * (i >> 2));
    }
  }
}

// With kVectors a pair is one access, otherwise two.
template <class T, bool kVectors>
__device__ __forceinline__ void add_old(const Consumer& me, const T* corner, int64_t row_stride, int rows, int columns,
                                        float (&results)[64]) {
  for_each_pair(me, corner, row_stride, rows, columns, [&](int i, const T* address) {
    typename Pair<T>::Type pair;
    if (kVectors) {
      pair = *reinterpret_cast<const typename Pair<T>::Type*>(address);
    } else {
      pair.x = address[0], pair.y = address[1];
    }
    const float2 old = Pair<T>::widen(pair);
    results[i] += old.x, results[i + 1] += old.y;
  });
}
template <class T, bool kVectors>
__device__ __forceinline__ void store_pairs(const Consumer& me, T* corner, int64_t row_stride, int rows, int columns,
                                            const float (&results)[64]) {
  for_each_pair(me, corner, row_stride, rows, columns, [&](int i, T* address) {
    const typename Pair<T>::Type pair = Pair<T>::round(results[i], results[i + 1]);
    if (kVectors) {
      *reinterpret_cast<typename Pair<T>::Type*>(address) = pair;
    } else {
      address[0] = pair.x, address[1] = pair.y;
    }
  });
}

// bfloat16 through this warp's own slab of shared memory, 64 columns at a time: fragments in by stmatrix, whole lines
// of 128 bytes out. The 16-byte chunks of a row are permuted by its index, so that neither side meets a bank twice.
__device__ __forceinline__ void store_lines(uint32_t shared, const Consumer& me, __nv_bfloat16* corner,
                                            int64_t row_stride, int rows, int columns, const float (&results)[64]) {
  const uint32_t slab = shared + kOffsetSlab + (4 * me.warpgroup + me.warp) * kSlabBytes;
  const int in_row = me.lane % 16, out_row = me.lane / 8, chunk = me.lane % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();  // the slab has been read
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 16 columns
      const float* f = results + 32 * half + 8 * j;
      ptx::stmatrix_x4(slab + in_row * 128 + (((2 * j + me.lane / 16) ^ (in_row % 8)) << 4),
                       ptx::cvt_rn_bf16x2_f32(f[0], f[1]), ptx::cvt_rn_bf16x2_f32(f[2], f[3]),
                       ptx::cvt_rn_bf16x2_f32(f[4], f[5]), ptx::cvt_rn_bf16x2_f32(f[6], f[7]));
    }
    __syncwarp();
    const int column = 64 * half + 8 * chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = out_row + 4 * i;
      uint4 line;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                   : "r"(slab + row * 128 + ((chunk ^ (row % 8)) << 4))
                   : "memory");
      if (me.first_row() + row < rows && column < columns) {
        *reinterpret_cast<uint4*>(corner + (me.first_row() + row) * row_stride + column) = line;
      }
    }
  }
}

template <class T, bool kVectors>
__device__ __forceinline__ void store_as(uint32_t shared, const Consumer& me, const OutputView& out, int64_t corner,
                                         int rows, int columns, float (&results)[64]) {
  T* data = static_cast<T*>(out.data) + corner;
  if (out.accumulate) add_old<T, kVectors>(me, data, out.row_stride, rows, columns, results);
  if constexpr (kVectors && sizeof(T) == 2) {
    store_lines(shared, me, data, out.row_stride, rows, columns, results);
  } else {
    store_pairs<T, kVectors>(me, data, out.row_stride, rows, columns, results);
  }
}

// Stores the tile whose corner is (row, column) of group `group`; `rows` and `columns` are what is left from there on.
__device__ __forceinline__ void store_tile(uint32_t shared, const Consumer& me, const OutputView& out, int group,
                                           int64_t row, int column, int rows, int columns, float (&results)[64]) {
  const int64_t corner = group * out.group_stride + row * out.row_stride + column;
  if (out.is_float32) {
    if (out.vectors) {
      store_as<float, true>(shared, me, out, corner, rows, columns, results);
    } else {
      store_as<float, false>(shared, me, out, corner, rows, columns, results);
    }
  } else {
    if (out.vectors) {
      store_as<__nv_bfloat16, true>(shared, me, out, corner, rows, columns, results);
    } else {
      store_as<__nv_bfloat16, false>(shared, me, out, corner, rows, columns, results);
    }
  }
}

}  // namespace dsv3
