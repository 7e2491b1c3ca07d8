// mla_decode: attention of a few queries per request on its paged latent cache, in the absorbed form (docs/mla.md).
//
// A CTA takes 64 rows (query x head) of a request and walks over the keys that the plan gives it, 64 at a time. The
// output of 64 x 512 float32 is half of the register file: two warpgroups have 256 columns each. Tile t is formed
// (scores, softmax, weights) by warpgroup t mod 2, which hands its weights to the other one through shared memory, and
// multiplied with the values by both. While one forms its softmax, the other's products run, and its own of the last
// tile. mla_decode_simple.cu does the same with less to understand, and has the same bits.
//
// Roles      warps 0..3    bfloat16 cache: warp 0 issues tensor copies; FP8 cache: all decode rows (mla/decode_fp8.cuh)
//            warps 4..11   two consumer warpgroups
// Barriers   full, empty   of the ring: mla/decode_tile.cuh
//            ready[w]      4 arrivals, of the warps of warpgroup w: its weights and their maximum are there
//            named         all consumers: queries are there; they are no longer read; output on its way is gone. One
//                          warpgroup: rows that do not exist are cleared
// Registers  40 and 232 (bfloat16), 72 and 216 (FP8): output 128, scores 32, weights 16, rotary queries 16
// Budget     per tile, cycles: tensor 1152 + 1024 = 2176; shared memory 2304 (queries 64 KB, keys 72, values 64,
//            weights 16, filling 72, at 128 bytes a cycle); memory 4947 on an H100 and 3444 on an H200, with an FP8
//            cache 2816 and 1984. Nothing of it is measured: it follows from counting.
#include "mla/decode_fp8.cuh"
#include "mla/decode_tile.cuh"

namespace dsv3 {
namespace {

// Where keys come from: how many warps bring them, and whether consumers clear the rows that do not exist.
template <int kCtasOfCluster>
struct Bf16Cache {
  static constexpr int kCtas = kCtasOfCluster;
  static constexpr int kProducers = 1, kFullArrivals = 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kClears = true;
  static __device__ __forceinline__ void load(const MlaDecodeParams& p, uint32_t shared, Slot& slot, int,
                                              const Item& item) {
    load_tiles<kCtas>(p, shared, slot, item);
  }
};
struct Fp8Cache {
  static constexpr int kCtas = 1;
  static constexpr int kProducers = kFp8Warps, kFullArrivals = kFp8Warps;
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static constexpr bool kClears = false;
  static __device__ __forceinline__ void load(const MlaDecodeParams& p, uint32_t shared, Slot& slot, int warp,
                                              const Item& item) {
    load_fp8_tiles(p, shared, slot, warp, item);
  }
};

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

template <class Cache>
__device__ __forceinline__ void consume(const MlaDecodeParams& p, uint32_t shared, const Consumer& me) {
  const Rows rows(p);
  Slot slot;           // of the item's first tile
  uint32_t phase = 0;  // of the other warpgroup's next weights, across items
  for_each_item(p, [&](int index, const Item& item) {
    uint32_t rope[4][4];
    load_queries(p, shared, me, rows, item.request, rope);
    RowState state = fresh_rows(p, me, rows, item);
    const int unmasked = unmasked_end(p, item), tiles = item.tiles();
    float o[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0.0f;

    Slot before = slot, mine = slot;
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
    for (int t = 0; t < tiles; ++t) slot.advance();  // a closed form makes ptxas 13.5 spill in mla_decode_fp8

    float sum[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      sum[side] = row_sum(state.sum[side]);
      if (me.lane % 4 == 0) st_shared(shared + kSums + 256 * me.warpgroup + 4 * (me.row() + 8 * side), sum[side]);
    }
    ptx::bar_sync(kAllConsumers, kConsumers);  // and nobody reads the queries any more
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      sum[side] += ld_shared(shared + kSums + 256 * (1 - me.warpgroup) + 4 * (me.row() + 8 * side));
    }
    store_output(p, shared, me, rows, index, item, state.maximum, sum, o);
    ptx::bar_sync(kAllConsumers, kConsumers);  // nobody reads the output on its way any more
  });
}

template <class Cache>
__device__ __forceinline__ void run(const MlaDecodeParams& p) {
  static_assert(Cache::kProducerRegisters + 2 * Cache::kConsumerRegisters <= 3 * 168,
                "setmaxnreg.inc would wait for ever");
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  ptx::griddepcontrol_launch_dependents();
  initialise_barriers<Cache::kCtas>(shared, Cache::kFullArrivals);
  ptx::griddepcontrol_wait();
  if (warp < 4) {
    ptx::setmaxnreg_dec<Cache::kProducerRegisters>();
    Slot slot;
    if (warp < Cache::kProducers) {
      for_each_item(p, [&](int, const Item& item) { Cache::load(p, shared, slot, warp, item); });
    }
    leave<Cache::kCtas>();
  } else {
    ptx::setmaxnreg_inc<Cache::kConsumerRegisters>();
    consume<Cache>(p, shared, Consumer(warp));
    leave<Cache::kCtas>();
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_bf16(const __grid_constant__ dsv3::MlaDecodeParams p) {
  dsv3::run<dsv3::Bf16Cache<1>>(p);
}

// Clusters of two blocks of rows, which read the same keys: each copies half of them, to both.
extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_bf16_pair(const __grid_constant__ dsv3::MlaDecodeParams p) {
  dsv3::run<dsv3::Bf16Cache<2>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_fp8(const __grid_constant__ dsv3::MlaDecodeParams p) {
  dsv3::run<dsv3::Fp8Cache>(p);
}

// Requests in several items: a warp joins a row's partial outputs, in the order of the splits.
extern "C" __global__ void __launch_bounds__(dsv3::kCombineThreads)
    mla_decode_combine(const __grid_constant__ dsv3::MlaDecodeParams p) {
  using namespace dsv3;
  ptx::griddepcontrol_wait();
  const int groups = (p.rows + kCombineRows - 1) / kCombineRows;
  const int request = blockIdx.x / groups, row = blockIdx.x % groups * kCombineRows + warp_index();
  const int first = p.splits[request], splits = p.splits[request + 1] - first;
  if (splits == 1 || row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const float* lse = p.partial_lse + static_cast<int64_t>(first) * p.rows + row;
  const auto lse_of = [&](int split) { return split < splits ? lse[static_cast<int64_t>(split) * p.rows] : -INFINITY; };

  float top = -INFINITY;
  for (int split = lane; split < splits; split += 32) top = fmaxf(top, lse_of(split));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float shift = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int split = lane; split < splits; split += 32) total += ptx::ex2_approx_ftz_f32(lse_of(split) - shift);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  if (lane == 0) {
    constexpr float kLn2 = 0.693147180559945309f;
    p.lse[static_cast<int64_t>(request) * p.rows + row] = total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
  }

  // Lane l has columns 4 l to 4 l + 3 of each 128.
  constexpr int kQuarters = kDecodeLatent / 128;
  float4 sum[kQuarters];
#pragma unroll
  for (float4& quarter : sum) quarter = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float* partial = p.partial_out + (static_cast<int64_t>(first) * p.rows + row) * kDecodeLatent + 4 * lane;
  for (int begin = 0; begin < splits; begin += 32) {
    const float mine = ptx::ex2_approx_ftz_f32(lse_of(begin + lane) - shift) * inverse;
    for (int i = 0; i < min(32, splits - begin); ++i) {
      const float weight = __shfl_sync(~0u, mine, i);
      const float4* row_of =
          reinterpret_cast<const float4*>(partial + (begin + i) * (static_cast<int64_t>(p.rows) * kDecodeLatent));
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        const float4 part = row_of[32 * j];
        sum[j].x = fmaf(weight, part.x, sum[j].x);
        sum[j].y = fmaf(weight, part.y, sum[j].y);
        sum[j].z = fmaf(weight, part.z, sum[j].z);
        sum[j].w = fmaf(weight, part.w, sum[j].w);
      }
    }
  }
  const int query = row / p.heads, head = row - query * p.heads;
  uint16_t* out =
      p.out + request * p.out_request_stride + query * p.out_query_stride + head * p.out_head_stride + 4 * lane;
#pragma unroll
  for (int j = 0; j < kQuarters; ++j) {
    const uint2 value =
        make_uint2(ptx::cvt_rn_bf16x2_f32(sum[j].x, sum[j].y), ptx::cvt_rn_bf16x2_f32(sum[j].z, sum[j].w));
    if (p.out_vectors) {
      *reinterpret_cast<uint2*>(out + 128 * j) = value;
    } else {
      const uint32_t parts[2] = {value.x, value.y};
#pragma unroll
      for (int i = 0; i < 4; ++i) out[128 * j + i] = static_cast<uint16_t>(parts[i / 2] >> (16 * (i % 2)));
    }
  }
}
