// mla_decode: attention of a few queries per request on its paged latent cache, in the absorbed form (docs/mla.md).
//
// A CTA takes 64 rows (query x head) of a request and walks over the keys that the plan gives it, 64 at a time
// (mla/decode_loop.cuh), item after item. mla_decode_simple.cu does the same with less to understand, and has the same
// bits.
//
// Roles      warps 0..3    bfloat16 cache: warp 0 issues tensor copies; FP8 cache: all decode rows (mla/decode_fp8.cuh)
//            warps 4..11   two consumer warpgroups
// Barriers   full, empty, ready: mla/decode_tile.cuh, mla/decode_loop.cuh
//            named         all consumers: theirs of the loop, and: output on its way is gone
// Registers  the loop's, 40 and 232 (bfloat16), 72 and 216 (FP8)
// Budget     per tile, cycles: the loop's, tensor 2176 and shared memory 2304; memory 4947 on an H100 and 3444 on an
//            H200, with an FP8 cache 2816 and 1984. Nothing of it is measured: it follows from counting.
#include "mla/decode_loop.cuh"

namespace dsv3 {
namespace {

template <class Cache>
__device__ __forceinline__ void consume(const MlaDecodeParams& p, uint32_t shared, const Consumer& me) {
  const Rows rows(p, blockIdx.x);
  Slot slot;           // of the item's first tile
  uint32_t phase = 0;  // of the other warpgroup's next weights, across items
  for_each_item(p, [&](int index, const Item& item) {
    uint32_t rope[4][4];
    load_queries(p, shared, me, rows, item.request, rope);
    RowState state = fresh_rows(p, me, rows, item);
    float o[128];
    walk<Cache>(p, shared, me, item, rope, slot, phase, state, o);
    for (int t = 0; t < item.tiles(); ++t) slot.advance();  // a closed form makes ptxas 13.5 spill in mla_decode_fp8
    float sum[2];
    add_sums(shared, me, state, sum);
    store_output(p, shared, me, rows, index, item, state.maximum, sum, o);
    ptx::bar_sync(kAllConsumers, kConsumers);  // nobody reads the output on its way any more
  });
}

template <class Cache>
__device__ __forceinline__ void run(const MlaDecodeParams& p) {
  static_assert(fits<Cache>(), "setmaxnreg.inc would wait for ever");
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
      for_each_item(p, [&](int, const Item& item) { Cache::load(p, shared, slot, warp, item, gridDim.x); });
      drain<Cache::kCtas>(shared, slot);
    }
  } else {
    ptx::setmaxnreg_inc<Cache::kConsumerRegisters>();
    consume<Cache>(p, shared, Consumer(warp));
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
  dsv3::run<dsv3::Fp8Cache<72, 216>>(p);
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
    store_four(out + 128 * j, sum[j], p.out_vectors);
  }
}
