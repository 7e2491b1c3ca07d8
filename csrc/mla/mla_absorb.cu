// mla_absorb: out[t, h] = x[t, h] weight[h]^T for every head h, bf16 in and out, float32 sums: what decoding multiplies
// its queries with before attention and its outputs with after it.
//
// Persistent CTAs take tiles of one head, kRows tokens x kColumns of N, with a stride of the grid. A result depends on
// its row of x and its row of the weight alone, not on T, the grid or the tile.
//
// Roles      warp 0        tensor copies of x and weight (one elected lane)
//            warps 1..3    leave at once
//            warps 4..     kRows / 64 consumer warpgroups, 64 tokens each: wgmma, output
// Barriers   full[s]       1 arrival with the bytes of 64 of K of both operands
//            empty[s]      an arrival of every consumer warp: its warpgroup's products with the stage are done
//            Both sides walk the ring with a Slot that lives as long as the CTA, across tiles: while a tile is stored,
//            the next ones' operands arrive. No named barriers: a warp stores its own 16 rows.
// Weights    a row of the weight is contiguous (_k: K-major, as W_UV lies in kv_b), or a column is (_n: MN-major, as
//            W_UK does): wgmma takes its right operand either way.
// Registers  94 of a thread at most, 64 of them sums: no warp has to leave some to another (setmaxnreg)
// Budget     tile     stages  bytes   cycles per 64 of K: tensor  shared memory (wgmma reads, copies write)
//            64x64    13      221392                      128     256
//            64x128   8       213120                      256     384
//            128x128  6       229472                      512     640
//            Memory bounds all of it. Few tokens: the weights, at 4.8 TB/s 770 cycles for the 16 KB of a stage. Many:
//            1280 bytes of x and out per 131072 operations, so that a 128x128 tile's share (K = 128, N = 512) takes
//            1920 cycles, in which the tensor cores are busy for 1024. docs/mla.md has the count.
#include "mla/consumer.cuh"
#include "mla/mla_absorb_params.h"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/ring.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {
namespace {

constexpr int kDepth = 64;  // of K, in a stage: a row of 128 bytes, the swizzle's span
constexpr int kSectionHeads = 8;

// Of a tile: its size, and the byte offsets of what it keeps in dynamic shared memory.
template <int kTokens, int kWidth, bool kTransposed>
struct Tile {
  static constexpr int kRows = kTokens;
  static constexpr int kColumns = kWidth;
  static constexpr bool kNMajor = kTransposed;
  static constexpr int kConsumerWarps = kRows / 16;
  static constexpr int kStages = absorb_stages(kRows, kColumns);
  static constexpr uint32_t kXBytes = kRows * 2 * kDepth;
  static constexpr uint32_t kWeightBytes = kColumns * 2 * kDepth;
  static constexpr uint32_t kPanelBytes = 64 * 128;      // of a weight whose N is contiguous: 64 of K x 64 of N
  static constexpr uint32_t kSlabBytes = 16 * 128;       // of one warp's output: 16 rows of 64 columns
  static constexpr uint32_t kWarpSlabs = kColumns / 64;  // side by side

  static constexpr uint32_t kX = 0;
  static constexpr uint32_t kWeight = kX + kStages * kXBytes;
  static constexpr uint32_t kSlabs = kWeight + kStages * kWeightBytes;
  static constexpr uint32_t kFull = kSlabs + kConsumerWarps * kWarpSlabs * kSlabBytes;
  static constexpr uint32_t kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kBytes = kEmpty + 8 * kStages;

  static_assert(kRows == 64 || kRows == 128, "one or two consumer warpgroups of 64 rows");
  static_assert(kColumns == 64 || kColumns == 128, "whole panels of the output");
  static_assert(kXBytes % 1024 == 0 && kWeightBytes % 1024 == 0 && kSlabBytes % 1024 == 0,
                "the swizzle repeats every 1024 bytes: no base offset");
  static_assert(kBytes == absorb_shared_bytes(kRows, kColumns), "what the launcher asks for");
  static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
};

template <class Tile>
struct Slot : ptx::RingSlot<Tile::kStages> {};

struct Place {
  int head, token, column;  // first ones
};

// visit(place): this CTA's tiles, in the same order for every warp. The columns of the same tokens and head are
// neighbours and share x in L2; so are a section's heads, whose rows lie side by side in x and out; a section's weights
// (1 MB) are in L2 from its first tokens to its last.
template <class Tile, class Visit>
__device__ __forceinline__ void for_each_tile(const MlaAbsorbParams& p, Visit visit) {
  const int section_tiles = kSectionHeads * p.token_tiles * p.column_tiles;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int first = tile / section_tiles * kSectionHeads, within = tile % section_tiles;
    const int heads = min(kSectionHeads, p.heads - first), rest = within / p.column_tiles;
    visit(Place{first + rest % heads, rest / heads * Tile::kRows, within % p.column_tiles * Tile::kColumns});
  }
}

// One lane of warp 0. Boxes that hang over an edge are filled with zeros and count in full.
template <class Tile>
__device__ __forceinline__ void load_tile(const MlaAbsorbParams& p, uint32_t shared, Slot<Tile>& slot, Place at) {
#pragma unroll 1
  for (int block = 0; block < p.blocks; ++block) {
    const uint32_t full = shared + Tile::kFull + 8 * slot.stage;
    const uint32_t weight = shared + Tile::kWeight + slot.stage * Tile::kWeightBytes;
    ptx::mbarrier_wait_parity(shared + Tile::kEmpty + 8 * slot.stage, slot.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, Tile::kXBytes + Tile::kWeightBytes);
    if constexpr (Tile::kNMajor) {
#pragma unroll
      for (int panel = 0; panel < Tile::kColumns / 64; ++panel) {
        ptx::cp_async_bulk_tensor_3d_g2s(weight + panel * Tile::kPanelBytes, &p.weight, full, at.column + 64 * panel,
                                         block * kDepth, at.head);
      }
    } else {
      ptx::cp_async_bulk_tensor_3d_g2s(weight, &p.weight, full, block * kDepth, at.column, at.head);
    }
    ptx::cp_async_bulk_tensor_3d_g2s(shared + Tile::kX + slot.stage * Tile::kXBytes, &p.x, full, block * kDepth,
                                     at.token, at.head);
    slot.advance();
  }
}

// Sums of this warpgroup's 64 rows over all of K. A stage is given back when the next one's products are under way.
template <class Tile>
__device__ __forceinline__ void multiply(uint32_t shared, Slot<Tile>& slot, const Consumer& me, int blocks,
                                         float (&sums)[Tile::kColumns / 2]) {
  // 16 of K: 32 bytes within a row, or 16 rows of the panel, where the next 64 columns are a panel away.
  constexpr uint32_t kStep = Tile::kNMajor ? 16 * 128 : 32, kLeading = Tile::kNMajor ? Tile::kPanelBytes : 16;
  uint32_t before = 0;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    ptx::mbarrier_wait_parity(shared + Tile::kFull + 8 * slot.stage, slot.parity);
    const uint64_t x = ptx::matrix_descriptor(shared + Tile::kX + slot.stage * Tile::kXBytes + me.warpgroup * 64 * 128,
                                              16, 1024, ptx::Swizzle::k128B);
    const uint64_t weight = ptx::matrix_descriptor(shared + Tile::kWeight + slot.stage * Tile::kWeightBytes, kLeading,
                                                   1024, ptx::Swizzle::k128B);
    ptx::pin(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      ptx::wgmma_bf16_ss<0, Tile::kNMajor>(sums, x + i * (32 / 16), weight + i * (kStep / 16), (block | i) != 0);
    }
    ptx::wgmma_commit_group();
    ptx::pin(sums);
    ptx::wgmma_wait_group<1>();
    if (block > 0) arrive(shared + Tile::kEmpty + 8 * before, me);
    before = slot.stage;
    slot.advance();
  }
  ptx::wgmma_wait_group<0>();
  ptx::pin(sums);
  arrive(shared + Tile::kEmpty + 8 * before, me);
}

// This warp's 16 rows through its own slabs, 64 columns each; the copies end at the last token and at the last column.
template <class Tile>
__device__ __forceinline__ void store_lines(const MlaAbsorbParams& p, uint32_t slabs, const Consumer& me, Place at,
                                            const float (&sums)[Tile::kColumns / 2]) {
  if (ptx::elect_sync()) ptx::cp_async_bulk_wait_group_read<0>();  // the slabs of the tile before have been read
  __syncwarp();
  const int row = me.lane % 16;
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 16; ++j) {  // 16 columns
    const float* f = sums + 8 * j;
    ptx::stmatrix_x4(slabs + j / 4 * Tile::kSlabBytes + row * 128 + (((2 * (j % 4) + me.lane / 16) ^ (row % 8)) << 4),
                     ptx::cvt_rn_bf16x2_f32(f[0], f[1]), ptx::cvt_rn_bf16x2_f32(f[2], f[3]),
                     ptx::cvt_rn_bf16x2_f32(f[4], f[5]), ptx::cvt_rn_bf16x2_f32(f[6], f[7]));
  }
  ptx::fence_proxy_async_shared();
  __syncwarp();
  if (ptx::elect_sync()) {
#pragma unroll
    for (int slab = 0; slab < Tile::kWarpSlabs; ++slab) {
      if (at.column + 64 * slab >= p.columns) break;
      ptx::cp_async_bulk_tensor_3d_s2g(&p.out, slabs + slab * Tile::kSlabBytes, at.column + 64 * slab, at.token,
                                       at.head);
    }
    ptx::cp_async_bulk_commit_group();
  }
  __syncwarp();
}

// The same where a row of out may start anywhere: no vectors.
template <class Tile>
__device__ __forceinline__ void store_elements(const MlaAbsorbParams& p, const Consumer& me, Place at,
                                               const float (&sums)[Tile::kColumns / 2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = at.token + me.lane / 4 + 8 * half;
    if (token >= p.tokens) continue;
    uint16_t* out = p.out_data + token * p.out_token_stride + at.head * p.out_head_stride;
#pragma unroll
    for (int i = 2 * half; i < Tile::kColumns / 2; i += 4) {
      const int column = at.column + 8 * (i >> 2) + me.column();
      if (column >= p.columns) continue;
      const uint32_t pair = ptx::cvt_rn_bf16x2_f32(sums[i], sums[i + 1]);
      out[column] = static_cast<uint16_t>(pair);
      out[column + 1] = static_cast<uint16_t>(pair >> 16);
    }
  }
}

template <class Tile>
__device__ __forceinline__ void absorb(const MlaAbsorbParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&p.x);
    ptx::prefetch_tensormap(&p.weight);
#pragma unroll
    for (int s = 0; s < Tile::kStages; ++s) {
      ptx::mbarrier_init(shared + Tile::kFull + 8 * s, 1);
      ptx::mbarrier_init(shared + Tile::kEmpty + 8 * s, Tile::kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // what is above touches no memory of the caller's

  Slot<Tile> slot;
  if (warp < 4) {
    if (warp == 0 && ptx::elect_sync()) {
      for_each_tile<Tile>(p, [&](Place at) { load_tile(p, shared, slot, at); });
      ptx::griddepcontrol_launch_dependents();
    }
  } else {
    const Consumer me(warp);
    const uint32_t slabs = shared + Tile::kSlabs + (warp - 4) * Tile::kWarpSlabs * Tile::kSlabBytes;
    for_each_tile<Tile>(p, [&](Place at) {
      float sums[Tile::kColumns / 2];
      multiply(shared, slot, me, p.blocks, sums);
      at.token += 16 * (warp - 4);
      if (at.token >= p.tokens) return;
      if (p.vectors) {
        store_lines<Tile>(p, slabs, me, at, sums);
      } else {
        store_elements<Tile>(p, me, at, sums);
      }
    });
    if (ptx::elect_sync()) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory must outlive the last copies
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(64), 1)
    mla_absorb_64x64_k(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<64, 64, false>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(64), 1)
    mla_absorb_64x64_n(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<64, 64, true>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(64), 1)
    mla_absorb_64x128_k(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<64, 128, false>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(64), 1)
    mla_absorb_64x128_n(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<64, 128, true>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(128), 1)
    mla_absorb_128x128_k(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<128, 128, false>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::absorb_threads(128), 1)
    mla_absorb_128x128_n(const __grid_constant__ dsv3::MlaAbsorbParams p) {
  dsv3::absorb<dsv3::Tile<128, 128, true>>(p);
}
