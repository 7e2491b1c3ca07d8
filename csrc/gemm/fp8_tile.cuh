// A tile of D = A * B^T in E4M3, promoted to float32 every 128 of K: what the FP8 GEMM kernels share.
//
// A tile of fewer than 128 rows is computed as its transpose, D^T = B * A^T: wgmma takes 64 rows at least from its left
// operand and 8 from its right one, so that 128 rows of B (weights) go left and the few rows of A (tokens) right.
//
// Two CTAs may work as a pair, a cluster with twice the columns: they have the same rows of A, of which each copies one
// half to both, and columns of their own. What L2 must deliver per tile falls by A's half.
//
// Roles      warp 0        tensor copies of A and B (one elected lane)
//            warp 1        copies of the scales, 4 bytes a lane: any strides, no relayout before the GEMM
//            warps 2, 3    leave at once
//            warps 4..11   two consumer warpgroups, half of the tile's rows each: wgmma, promotion, output
// Barriers   full[s]       1 arrival with the bytes of A and B (warp 0) + 32 as the scales land (the lanes of warp 1)
//            empty[s]      8 arrivals, one per consumer warp, when it no longer reads the stage; in a pair 16, of both
//                          CTAs' warps, because each producer writes into both
//            Both sides walk the ring with a Slot that lives as long as the CTA, across tiles. No named barriers.
// Registers  40 for the producers, 232 for the consumers
// Budget     tile      stages  bytes     cycles per k-block: tensor  shared memory  FFMA    results + partial sums
//            128x128   6       219232                        512     640            128     64 + 2 x 64
//            256x128   4       219200                        1024    1152           256     2 x 64 + 64
//            128x192   5       227664                        768     832            192     96 + 96
//            64x128    8       231616                        256     448            64      32 + 2 x 32
//            32x128    10      225760                        128     352            32      16 + 2 x 16
//            16x128    11      216496                        64      304            16      8 + 2 x 8
//            8x128     12      219264                        32      280            8       4 + 2 x 4
//            Shared memory is the bound: what wgmma reads and the copies write, at 128 bytes a cycle.
//            Below 128 rows it is the weights' way from memory instead: docs/gemm.md, "Few rows".
// Overlap    128x128 and below: a warpgroup promotes one k-block while its next one multiplies, four k-blocks per
//            iteration; a partial sum in flight across the loop's back edge would make ptxas serialise every wgmma
//            (C7514). The larger tiles have registers for one partial sum only: there one warpgroup promotes while the
//            other multiplies.
#pragma once

#include "gemm/fp8_params.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/ring.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {

constexpr int kTileK = 128;
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 128 + 32 * kConsumerWarps;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kBlocksPerIteration = 4;
constexpr uint32_t kSlabBytes = 16 * 128;  // of one warp's output: 16 rows of 64 bfloat16

static_assert(kTileK == 128, "one k-block is a row of 128 bytes: the swizzle's span, and one scale");
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg.inc would wait for ever");
static_assert(kThreads == kFp8Threads, "what the launchers ask for");

// Whether B has a scale per 128 rows (weights) or per row (the other operand of a weight gradient). A swapped tile,
// whose right operand is A, is of the second kind; its B may have either.
enum class BScale { kBlock, kRow };

// Rows and columns of a CTA's tile of D, the CTAs of a cluster that stand side by side along N, and the byte offsets of
// what a CTA keeps in dynamic shared memory.
template <int kRowsOfD, int kColumnsOfD, int kCtasOfCluster = 1>
struct Tile {
  static constexpr int kRows = kRowsOfD;
  static constexpr int kColumns = kColumnsOfD;
  static constexpr int kCtas = kCtasOfCluster;
  static constexpr bool kSwapped = kRows < 128;
  static constexpr int kM = kSwapped ? kColumns : kRows;  // rows of wgmma's left operand
  static constexpr int kN = kSwapped ? kRows : kColumns;  // and of its right one
  static constexpr int kWaves = kM / 128;                 // a consumer warpgroup takes 64 rows at a time
  static constexpr int kResults = kN / 2;                 // registers of 64 rows
  static constexpr int kStages = fp8_stages(kRows, kColumns);
  static constexpr bool kTwoPartials = kM == 128 && kN <= 128;

  static constexpr uint32_t kLeftBytes = kM * kTileK;
  static constexpr uint32_t kRightBytes = kN * kTileK;
  static constexpr uint32_t kLeftScaleBytes = kM * 4;
  static constexpr uint32_t kRightScaleBytes = kN * 4;
  static constexpr uint32_t kPartialBytes = 16 * kN * 4;  // of one warp's sums
  static constexpr uint32_t kLeft = 0;
  static constexpr uint32_t kRight = kLeft + kStages * kLeftBytes;
  static constexpr uint32_t kSlabs = kRight + kStages * kRightBytes;
  static constexpr uint32_t kLeftScale = kSlabs + (kSwapped ? 7 * kPartialBytes : kConsumerWarps * kSlabBytes);
  static constexpr uint32_t kRightScale = kLeftScale + kStages * kLeftScaleBytes;
  static constexpr uint32_t kFull = kRightScale + kStages * kRightScaleBytes;
  static constexpr uint32_t kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kSums = kEmpty + 8 * kStages;  // barriers of a swapped tile
  static constexpr uint32_t kBytes = kSums + (kSwapped ? 8 * kConsumerWarps : 0);

  static_assert(kM == 128 || kM == 256, "one or two waves of two warpgroups; a box has 256 rows at most");
  static_assert(kN <= 64 ? kN == 64 || kN == 32 || kN == 16 || kN == 8 : kN == 128 || kN == 192,
                "what wgmma multiplies, promotion fits into registers, and the scales below");
  static_assert(kLeftBytes % 1024 == 0 && kRightBytes % 1024 == 0,
                "the swizzle repeats every 1024 bytes: no base offset");
  static_assert(kCtas == 1 || (kCtas == 2 && !kSwapped), "a pair shares A as wgmma's left operand");
  static_assert(kLeftBytes / kCtas % 1024 == 0, "a CTA's part of A is whole repeats of the swizzle");
  static_assert(kBytes == fp8_shared_bytes(kRows, kColumns), "what the launchers ask for");
  static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
};

template <class Tile>
struct Slot : ptx::RingSlot<Tile::kStages> {};

// The CTAs of a cluster walk over the same tiles, of the cluster's columns: its number among the clusters, their
// number, and the CTA's place in it.
template <class Tile>
__device__ __forceinline__ int first_tile() {
  return blockIdx.x / Tile::kCtas;
}
template <class Tile>
__device__ __forceinline__ int tile_step() {
  return gridDim.x / Tile::kCtas;
}
template <class Tile>
__device__ __forceinline__ int rank_in_cluster() {
  return Tile::kCtas == 1 ? 0 : static_cast<int>(ptx::cluster_ctarank());
}

// The tile's place in its matrix: bands of 8 rows of tiles, each walked column by column, so that the CTAs that run at
// the same time share few rows of A and few of B in L2.
struct TilePlace {
  int m, n;  // first row and column
};
template <class Tile>
__device__ __forceinline__ TilePlace rasterise(int tile, int m_tiles, int n_tiles) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * n_tiles);
  const int height = min(kBand, m_tiles - band * kBand);
  const int within = tile - band * kBand * n_tiles;
  return {(band * kBand + within % height) * Tile::kRows,
          (within / height * Tile::kCtas + rank_in_cluster<Tile>()) * Tile::kColumns};
}

// Role of this warp, in a register that is the same for all its lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

// First thing in the kernel, by all threads. Without k-blocks there are no tensor maps. A launch that may start before
// its predecessor has ended waits here; warp 0 lets its own successor start when the last copy is under way.
template <class Tile>
__device__ __forceinline__ void initialise_ring(uint32_t shared, const TensorMap* a, const TensorMap* b, int blocks) {
  if (threadIdx.x == 0) {
    if (blocks > 0) {
      ptx::prefetch_tensormap(a);
      ptx::prefetch_tensormap(b);
    }
#pragma unroll
    for (int s = 0; s < Tile::kStages; ++s) {
      ptx::mbarrier_init(shared + Tile::kFull + 8 * s, 1 + 32);
      ptx::mbarrier_init(shared + Tile::kEmpty + 8 * s, Tile::kCtas * kConsumerWarps);
    }
    if constexpr (Tile::kSwapped) {
#pragma unroll
      for (int warp = 0; warp < kConsumerWarps; ++warp) ptx::mbarrier_init(shared + Tile::kSums + 8 * warp, 1);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (Tile::kCtas == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  }
  ptx::griddepcontrol_wait();  // what is above touches no memory of the caller's
}

// Where an operand's tile lies in its tensor map [planes, rows, K].
struct OperandPlace {
  int row, plane;
};

// Warp 0, one lane: `blocks` k-blocks of A and B from `first_block` on. Boxes that hang over an edge are filled with
// zeros and count in full. In a pair the other CTA's half of A arrives on the same barrier.
template <class Tile>
__device__ __forceinline__ void load_operands(uint32_t shared, Slot<Tile>& slot, const TensorMap* a,
                                              OperandPlace a_place, const TensorMap* b, OperandPlace b_place,
                                              int first_block, int blocks) {
  const TensorMap *left = Tile::kSwapped ? b : a, *right = Tile::kSwapped ? a : b;
  const OperandPlace left_at = Tile::kSwapped ? b_place : a_place, right_at = Tile::kSwapped ? a_place : b_place;
  const int rank = rank_in_cluster<Tile>(), part = rank * Tile::kM / Tile::kCtas;  // first row that this CTA copies
#pragma unroll 1
  for (int block = first_block; block < first_block + blocks; ++block) {
    const uint32_t full = shared + Tile::kFull + 8 * slot.stage;
    ptx::mbarrier_wait_parity(shared + Tile::kEmpty + 8 * slot.stage, slot.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, Tile::kLeftBytes + Tile::kRightBytes);
    const uint32_t left_slot = shared + Tile::kLeft + slot.stage * Tile::kLeftBytes + part * kTileK;
    if constexpr (Tile::kCtas == 1) {
      ptx::cp_async_bulk_tensor_3d_g2s(left_slot, left, full, block * kTileK, left_at.row, left_at.plane);
    } else {
      ptx::cp_async_bulk_tensor_3d_g2s_multicast(left_slot, left, full, block * kTileK, left_at.row + part,
                                                 left_at.plane, (1 << Tile::kCtas) - 1);
    }
    ptx::cp_async_bulk_tensor_3d_g2s(shared + Tile::kRight + slot.stage * Tile::kRightBytes, right, full,
                                     block * kTileK, right_at.row, right_at.plane);
    slot.advance();
  }
}

// Warp 0, one lane, when its last copy is under way: in a pair, a CTA stays until the other one's warps have arrived on
// its barriers for the last time. (The other one's last copies into it are what its own warps wait for.)
template <class Tile>
__device__ __forceinline__ void drain(uint32_t shared, Slot<Tile>& slot) {
  if constexpr (Tile::kCtas > 1) {
#pragma unroll
    for (int s = 0; s < Tile::kStages; ++s) {
      ptx::mbarrier_wait_parity(shared + Tile::kEmpty + 8 * slot.stage, slot.parity ^ 1);
      slot.advance();
    }
  }
}

// Scales of an operand's rows of a tile, from the scale `index` on; its matrix has `rows` left. A row beyond takes the
// last one's scale, since its results are not stored.
struct ScalePlace {
  const ScaleView& view;
  int group, row, index, rows;

  __device__ __forceinline__ const float* corner(int first_block) const {
    return view.data + group * view.group_stride + index * view.row_stride + first_block * view.block_stride;
  }
};

// Warp 1: the scales of the same k-blocks. `rows` and `columns` count what is left of the matrix from the tile's corner
// on.
template <BScale kScale, class Tile>
__device__ __forceinline__ void load_scales(uint32_t shared, Slot<Tile>& slot, const ScaleView& a, int group_a, int row,
                                            int rows, const ScaleView& b, int group_b, int column, int columns,
                                            int first_block, int blocks) {
  static_assert(kScale == BScale::kRow || !Tile::kSwapped, "a swapped tile's right operand has a scale per row");
  constexpr int kRightLanes = kScale == BScale::kBlock ? 2 : Tile::kN < 32 ? Tile::kN : 32;
  constexpr int kRightLoads = kScale == BScale::kBlock || Tile::kN < 32 ? 1 : Tile::kN / 32;
  const int lane = threadIdx.x % 32;
  const bool b_by_row = Tile::kSwapped ? b.rows_per_scale == 1 : kScale == BScale::kRow;
  const ScalePlace of_a{a, group_a, row, row, rows};
  const ScalePlace of_b{b, group_b, column, b_by_row ? column : column / 128, columns};
  const ScalePlace &left = Tile::kSwapped ? of_b : of_a, &right = Tile::kSwapped ? of_a : of_b;
  const float *left_corner = left.corner(first_block), *right_corner = right.corner(first_block);
  // Offsets within the tile; launchers refuse strides that overflow them. The 128 rows of a swapped tile's B may have
  // one scale. A right operand with a scale per block has two at most: lane 0 copies that of the tile's first column
  // and lane 1 that of its last one.
  const uint32_t left_stride = Tile::kSwapped && !b_by_row ? 0 : static_cast<uint32_t>(left.view.row_stride);
  const uint32_t right_stride = static_cast<uint32_t>(right.view.row_stride);
  const int left_last = min(Tile::kM, left.rows) - 1, right_end = min(Tile::kN, right.rows);
  const int right_last = kScale == BScale::kRow ? right_end - 1 : (right.row + right_end - 1) / 128 - right.row / 128;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    ptx::mbarrier_wait_parity(shared + Tile::kEmpty + 8 * slot.stage, slot.parity ^ 1);
    const uint32_t left_slot = shared + Tile::kLeftScale + slot.stage * Tile::kLeftScaleBytes + 4 * lane;
    const uint32_t right_slot = shared + Tile::kRightScale + slot.stage * Tile::kRightScaleBytes + 4 * lane;
#pragma unroll
    for (int i = 0; i < Tile::kM / 32; ++i) {
      ptx::cp_async_ca_4(left_slot + 128 * i, left_corner + min(lane + 32 * i, left_last) * left_stride);
    }
    if (lane < kRightLanes) {
#pragma unroll
      for (int i = 0; i < kRightLoads; ++i) {
        ptx::cp_async_ca_4(right_slot + 128 * i, right_corner + min(lane + 32 * i, right_last) * right_stride);
      }
    }
    __syncwarp();
    ptx::cp_async_mbarrier_arrive_noinc(shared + Tile::kFull + 8 * slot.stage);
    left_corner += left.view.block_stride;
    right_corner += right.view.block_stride;
    slot.advance();
  }
}

// A consumer thread's place. Accumulator i of its wave w is element
// (row(w) + 8 * (i >> 1 & 1), 8 * (i >> 2) + column() + (i & 1)) of wgmma's product, which is a swapped tile's
// transpose (PTX ISA, wgmma, register fragments of D).
template <class Tile>
struct Consumer {
  int warpgroup, warp, lane;  // 0..1, 0..3, 0..31
  __device__ __forceinline__ explicit Consumer(int warp_of_cta)
      : warpgroup(warp_of_cta / 4 - 1), warp(warp_of_cta % 4), lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int first_row(int wave) const {
    return 64 * (Tile::kWaves * warpgroup + wave) + 16 * warp;
  }
  __device__ __forceinline__ int row(int wave) const { return first_row(wave) + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
  __device__ __forceinline__ int of_cta() const { return 4 * warpgroup + warp; }
  // Shared memory of this warp's own, for its output.
  __device__ __forceinline__ uint32_t slab(uint32_t shared) const {
    return shared + Tile::kSlabs + of_cta() * (Tile::kSwapped ? Tile::kPartialBytes / 2 : kSlabBytes);
  }
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

__device__ __forceinline__ float4 ld_shared_four(uint32_t address) {
  float4 four;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
  return four;
}

// 64 rows of a k-block that multiply: their stage, and the scales of this thread's two rows. With a scale of B per
// block they are multiplied by it: [0] by that of the tile's first columns, [1] of its last ones.
struct Running {
  uint32_t stage;
  float scale[2][2];
};

// Starts the multiplication of the stage at `slot`, which is full, into d.
template <BScale kScale, class Tile>
__device__ __forceinline__ Running start_wave(uint32_t shared, const Slot<Tile>& slot, const Consumer<Tile>& me,
                                              int wave, float (&d)[Tile::kResults]) {
  Running running;
  running.stage = slot.stage;
  const uint32_t left_scales = shared + Tile::kLeftScale + slot.stage * Tile::kLeftScaleBytes + 4 * me.row(wave);
  const uint32_t right_scales = shared + Tile::kRightScale + slot.stage * Tile::kRightScaleBytes;
  const float low = ld_shared(left_scales), high = ld_shared(left_scales + 4 * 8);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float b_scale =
        kScale == BScale::kBlock && (side == 0 || Tile::kN > 128) ? ld_shared(right_scales + 4 * side) : 1;
    running.scale[side][0] = kScale == BScale::kBlock ? low * b_scale : low;
    running.scale[side][1] = kScale == BScale::kBlock ? high * b_scale : high;
  }
  const uint32_t a_tile =
      shared + Tile::kLeft + slot.stage * Tile::kLeftBytes + (Tile::kWaves * me.warpgroup + wave) * 64 * kTileK;
  const uint32_t b_tile = shared + Tile::kRight + slot.stage * Tile::kRightBytes;
  const uint64_t a = ptx::matrix_descriptor(a_tile, 16, 8 * kTileK, ptx::Swizzle::k128B);
  const uint64_t b = ptx::matrix_descriptor(b_tile, 16, 8 * kTileK, ptx::Swizzle::k128B);
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileK / 32; ++k) ptx::wgmma_e4m3_ss(d, a + 2 * k, b + 2 * k, k != 0);  // 2: 32 bytes along K
  ptx::wgmma_commit_group();
  ptx::pin(d);
  return running;
}

template <class Tile>
__device__ __forceinline__ void wait_full(uint32_t shared, const Slot<Tile>& slot) {
  ptx::mbarrier_wait_parity(shared + Tile::kFull + 8 * slot.stage, slot.parity);
}

template <class Tile>
__device__ __forceinline__ void release(uint32_t shared, uint32_t stage, const Consumer<Tile>& me) {
  const uint32_t empty = shared + Tile::kEmpty + 8 * stage;
  __syncwarp();
  if constexpr (Tile::kCtas == 1) {
    if (me.lane == 0) ptx::mbarrier_arrive(empty);
  } else {
    if (me.lane < Tile::kCtas) ptx::mbarrier_arrive_cluster(ptx::mapa(empty, me.lane));
  }
}

// Promotes a product that has been waited for: results += partial * (a_scale * right_scale). `last`: the stage is
// released. `split`: from which column on a tile of more than 128 has its last scale of B, 64 or 128.
template <BScale kScale, class Tile>
__device__ __forceinline__ void promote(uint32_t shared, const Running& running, const Consumer<Tile>& me, bool last,
                                        int split, float (&d)[Tile::kResults], float (&results)[Tile::kResults]) {
  ptx::pin(d);
  if (kScale == BScale::kBlock) {
    if (last) release(shared, running.stage, me);  // its operands are multiplied and its scales in registers
    const float middle[2] = {split == 64 ? running.scale[1][0] : running.scale[0][0],
                             split == 64 ? running.scale[1][1] : running.scale[0][1]};
#pragma unroll
    for (int i = 0; i < Tile::kResults; ++i) {
      const int column = 8 * (i >> 2), half = i >> 1 & 1;
      const float scale = Tile::kN == 128 || column < 64 ? running.scale[0][half]
                          : column < 128                 ? middle[half]
                                                         : running.scale[1][half];
      results[i] = fmaf(scale, d[i], results[i]);
    }
  } else {
    const uint32_t scales = shared + Tile::kRightScale + running.stage * Tile::kRightScaleBytes + 4 * me.column();
#pragma unroll
    for (int i = 0; i < Tile::kResults; i += 4) {
      const float2 b_scale = ld_shared_pair(scales + 4 * 2 * i);
      results[i + 0] = fmaf(running.scale[0][0] * b_scale.x, d[i + 0], results[i + 0]);
      results[i + 1] = fmaf(running.scale[0][0] * b_scale.y, d[i + 1], results[i + 1]);
      results[i + 2] = fmaf(running.scale[0][1] * b_scale.x, d[i + 2], results[i + 2]);
      results[i + 3] = fmaf(running.scale[0][1] * b_scale.y, d[i + 3], results[i + 3]);
    }
    if (last) release(shared, running.stage, me);
  }
}

// A consumer warpgroup's rows of the tile whose first column is `column`, over `blocks` k-blocks (none: zeros).
template <BScale kScale, class Tile>
__device__ __forceinline__ void multiply_tile(uint32_t shared, Slot<Tile>& slot, const Consumer<Tile>& me, int column,
                                              int blocks, float (&results)[Tile::kWaves][Tile::kResults]) {
#pragma unroll
  for (int wave = 0; wave < Tile::kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < Tile::kResults; ++i) results[wave][i] = 0.0f;
  }
  const int split = 128 - column % 128;
  int block = 0;
  if constexpr (Tile::kTwoPartials) {
    for (; block + kBlocksPerIteration <= blocks; block += kBlocksPerIteration) {
      float d[2][Tile::kResults];
      Running running[2];
#pragma unroll
      for (int i = 0; i < kBlocksPerIteration; ++i) {
        wait_full(shared, slot);
        running[i % 2] = start_wave<kScale>(shared, slot, me, 0, d[i % 2]);
        slot.advance();
        if (i == 0) continue;
        ptx::wgmma_wait_group<1>();
        promote<kScale>(shared, running[(i - 1) % 2], me, true, split, d[(i - 1) % 2], results[0]);
      }
      ptx::wgmma_wait_group<0>();
      constexpr int kLast = (kBlocksPerIteration - 1) % 2;
      promote<kScale>(shared, running[kLast], me, true, split, d[kLast], results[0]);
    }
  }
  for (; block < blocks; ++block) {
    wait_full(shared, slot);
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave) {
      float d[Tile::kResults];
      const Running running = start_wave<kScale>(shared, slot, me, wave, d);
      ptx::wgmma_wait_group<0>();
      promote<kScale>(shared, running, me, wave == Tile::kWaves - 1, split, d, results[wave]);
    }
    slot.advance();
  }
}

}  // namespace dsv3
