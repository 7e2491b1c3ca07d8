// The loop of the decode kernels: an item's tiles of 64 keys, walked by two consumer warpgroups.
//
// The output of 64 x 512 float32 is half of the register file: a warpgroup has 256 columns of it. Tile t is formed
// (scores, softmax, weights) by warpgroup t mod 2, which hands its weights to the other one through shared memory, and
// multiplied with the values by both. While one forms its softmax, the other's products run, and its own of the last
// tile. Running maxima pass from tile to tile with the weights.
//
// Roles      warps 0..3    bfloat16 cache: warp 0 issues tensor copies; FP8 cache: all decode rows (mla/decode_fp8.cuh)
//            warps 4..11   two consumer warpgroups
// Barriers   full, empty   of the ring: mla/decode_tile.cuh
//            ready[w]      4 arrivals, of the warps of warpgroup w: its weights and their maximum are there
//            named         all consumers: queries are there; sums of both are there, and nobody reads queries or ring
//                          any more. One warpgroup: rows that do not exist are cleared
// Registers  of a consumer: output 128, scores 32, weights 16, rotary queries 16
// Budget     per tile, cycles: tensor 1152 + 1024 = 2176; shared memory 2304 (queries 64 KB, keys 72, values 64,
//            weights 16, filling 72, at 128 bytes a cycle)
#pragma once

#include "mla/decode_fp8.cuh"
#include "mla/decode_tile.cuh"

namespace dsv3 {

// Where keys come from: how many warps bring them, how many registers these and consumers have, and whether consumers
// clear the rows that do not exist.
template <int kCtasOfCluster>
struct Bf16Cache {
  static constexpr int kCtas = kCtasOfCluster;
  static constexpr int kProducers = 1, kFullArrivals = 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kClears = true;
  static __device__ __forceinline__ void load(const MlaDecodeParams& p, uint32_t shared, Slot& slot, int,
                                              const Item& item, unsigned row_blocks) {
    load_tiles<kCtas>(p, shared, slot, item, row_blocks);
  }
};
template <int kProducersHave, int kConsumersHave>
struct Fp8Cache {
  static constexpr int kCtas = 1;
  static constexpr int kProducers = kFp8Warps, kFullArrivals = kFp8Warps;
  static constexpr int kProducerRegisters = kProducersHave, kConsumerRegisters = kConsumersHave;
  static constexpr bool kClears = false;
  static __device__ __forceinline__ void load(const MlaDecodeParams& p, uint32_t shared, Slot& slot, int warp,
                                              const Item& item, unsigned) {
    load_fp8_tiles(p, shared, slot, warp, item);
  }
};

// Whether a CTA's registers, 168 for each of 384 threads, suffice.
template <class Cache>
constexpr bool fits() {
  return Cache::kProducerRegisters + 2 * Cache::kConsumerRegisters <= 3 * 168;
}

template <bool kValue>
struct First {
  static constexpr bool value = kValue;
};

// The other warpgroup's weights, of the tile at `slot`: starts their product with this warpgroup's values.
__device__ __forceinline__ void take(const MlaDecodeParams& p, uint32_t shared, const Slot& slot, const Consumer& me,
                                     uint32_t& phase, RowState& state, float (&o)[128]) {
  const int other = 1 - me.warpgroup;
  ptx::mbarrier_wait_parity(shared + kReady + 8 * other, phase);
  phase ^= 1;
  float factor[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float maximum = ld_shared(shared + kMaxima + 256 * other + 4 * (me.row() + 8 * side));
    factor[side] = raise(state.maximum[side], maximum, p.scale_log2);
    state.sum[side] *= factor[side];
  }
  rescale(factor, o);
  ptx::pin(o);
  ptx::wgmma_fence();
  add_values(shared + kWeights + other * kPanel, values(shared, slot, me.warpgroup), o);
  ptx::wgmma_commit_group();
  ptx::pin(o);
}

// ... and when it is over: the values' half and the weights' place are free.
template <class Cache>
__device__ __forceinline__ void taken(uint32_t shared, const Slot& slot, const Consumer& me, float (&o)[128]) {
  ptx::wgmma_wait_group<0>();
  ptx::pin(o);
  release<Cache::kCtas>(shared + slot.empty(me.warpgroup), me);
}

template <bool kFirst, class Cache>
__device__ __forceinline__ void attend(const MlaDecodeParams& p, uint32_t shared, const Slot& before, const Slot& slot,
                                       const Consumer& me, uint32_t& phase, const uint32_t (&rope)[4][4], int first,
                                       int rows, bool masked, RowState& state, float (&o)[128]) {
  if (Cache::kClears && rows < static_cast<int>(kDecodeKeys)) {
    ptx::mbarrier_wait_parity(shared + slot.full(0), slot.parity);
    ptx::mbarrier_wait_parity(shared + slot.full(1), slot.parity);
    clear_rows(shared + slot.tile(), rows, me.thread % 128, 128);
    ptx::bar_sync(kOneWarpgroup + me.warpgroup, 128);
  }
  float s[32];
  ptx::mbarrier_wait_parity(shared + slot.full(0), slot.parity);
  ptx::pin(s);
  ptx::wgmma_fence();
  start_scores<0>(shared, slot, rope, s);
  ptx::mbarrier_wait_parity(shared + slot.full(1), slot.parity);
  start_scores<1>(shared, slot, rope, s);
  ptx::wgmma_commit_group();
  ptx::pin(s);
  if constexpr (kFirst) {
    ptx::wgmma_wait_group<0>();
  } else {
    take(p, shared, before, me, phase, state, o);
    ptx::wgmma_wait_group<1>();
  }
  ptx::pin(s);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) release<Cache::kCtas>(shared + slot.empty(half), me);

  float maximum[2], factor[2];
  row_maxima(state, me, first, masked, s, maximum);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    if (me.lane % 4 == 0) st_shared(shared + kMaxima + 256 * me.warpgroup + 4 * (me.row() + 8 * side), maximum[side]);
    factor[side] = raise(state.maximum[side], maximum[side], p.scale_log2);
    state.sum[side] *= factor[side];
  }
  uint32_t fragments[4][4];
  weights(state, p.scale_log2, s, fragments);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::stmatrix_x4(
        shared + kWeights + me.warpgroup * kPanel + swizzled(me.first_row() + me.lane % 16, 2 * k + me.lane / 16),
        fragments[k][0], fragments[k][1], fragments[k][2], fragments[k][3]);
  }
  ptx::fence_proxy_async_shared();
  arrive(shared + kReady + 8 * me.warpgroup, me);

  if constexpr (!kFirst) taken<Cache>(shared, before, me, o);
  rescale(factor, o);
  ptx::pin(o);
  ptx::wgmma_fence();
  add_values(fragments, values(shared, slot, me.warpgroup), o);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::pin(o);
  release<Cache::kCtas>(shared + slot.empty(me.warpgroup), me);
}

// All tiles of an item, into `state` and the output `o`. `slot` is the place of the first one; Place is Slot or
// advances like it.
template <class Cache, class Place>
__device__ __forceinline__ void walk(const MlaDecodeParams& p, uint32_t shared, const Consumer& me, const Item& item,
                                     const uint32_t (&rope)[4][4], const Place& slot, uint32_t& phase, RowState& state,
                                     float (&o)[128]) {
  const int unmasked = unmasked_end(p, item), tiles = item.tiles();
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = 0.0f;
  Place before = slot, mine = slot;
  int tile = me.warpgroup;
  const auto step = [&](auto is_first) {
    const int first = item.first + tile * static_cast<int>(kDecodeKeys);
    attend<decltype(is_first)::value, Cache>(p, shared, before, mine, me, phase, rope, first,
                                             min(item.last - first, static_cast<int>(kDecodeKeys)),
                                             first + static_cast<int>(kDecodeKeys) > unmasked, state, o);
    tile += 2;
  };
  if (me.warpgroup == 0) {
    if (tiles > 0) step(First<true>{});
    before.advance();
    mine.advance();
    mine.advance();
  } else {
    mine.advance();
  }
#pragma unroll 1
  while (tile < tiles) {
    step(First<false>{});
    before.advance();
    before.advance();
    mine.advance();
    mine.advance();
  }
  if (tiles > 0 && (tiles - 1) % 2 != me.warpgroup) {
    take(p, shared, before, me, phase, state, o);
    taken<Cache>(shared, before, me, o);
  }
}

// A row's sum over both warpgroups' tiles. Behind its barrier of the consumers nobody reads queries or ring any more.
__device__ __forceinline__ void add_sums(uint32_t shared, const Consumer& me, const RowState& state, float (&sum)[2]) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sum[side] = row_sum(state.sum[side]);
    if (me.lane % 4 == 0) st_shared(shared + kSums + 256 * me.warpgroup + 4 * (me.row() + 8 * side), sum[side]);
  }
  ptx::bar_sync(kAllConsumers, kConsumers);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sum[side] += ld_shared(shared + kSums + 256 * (1 - me.warpgroup) + 4 * (me.row() + 8 * side));
  }
}

}  // namespace dsv3
