// mla_decode_simple: the decode kernel to read first, and the one that mla_decode.cu is tested against, bit for bit.
//
// A CTA takes 64 rows (query x head) of a request and walks over its keys, 64 at a time. The output of 64 x 512 float32
// is half of the register file: two warpgroups have 256 columns each. Both form the same scores and weights, so they
// have nothing to tell each other, and the softmax of one runs under the products of the other by itself. That costs a
// third more tensor time than mla_decode.cu takes.
//
// Roles      warp 0        tensor copies of the keys, page by page (bfloat16 cache)
//            warps 1..3    leave at once
//            warps 4..11   two consumer warpgroups: scores, softmax, their half of the output
// Barriers   full, empty: see mla/decode_tile.cuh
// Registers  40 for the producer, 232 for the consumers (output 128, scores 32, weights 16, rotary queries 16)
// Budget     per tile, cycles: tensor 2 x (1152 + 512) = 3328; shared memory (2 x (64 KB + 72 KB + 64 KB) read, 72 KB
//            written) 3776; copies of 72 KB at 64 bytes a cycle 1152
#include "mla/decode_tile.cuh"

namespace dsv3 {
namespace {

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg.inc would wait for ever");

// One tile: first key `first`, the first `rows` rows of it exist.
__device__ __forceinline__ void attend(const MlaDecodeParams& p, uint32_t shared, const Slot& slot, const Consumer& me,
                                       const uint32_t (&rope)[4][4], int first, int rows, bool masked, RowState& state,
                                       float (&other)[2], float (&o)[128]) {
  ptx::mbarrier_wait_parity(shared + slot.full(0), slot.parity);
  ptx::mbarrier_wait_parity(shared + slot.full(1), slot.parity);
  if (rows < static_cast<int>(kDecodeKeys)) {
    clear_rows(shared + slot.tile(), rows, me.thread, kConsumers);
    ptx::bar_sync(kAllConsumers, kConsumers);
  }
  float s[32];
  ptx::pin(s);
  ptx::wgmma_fence();
  start_scores<0>(shared, slot, rope, s);
  start_scores<1>(shared, slot, rope, s);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::pin(s);

  float maximum[2], factor[2];
  row_maxima(state, me, first, masked, s, maximum);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    factor[side] = raise(state.maximum[side], maximum[side], p.scale_log2);
    state.sum[side] *= factor[side];
    other[side] *= factor[side];
  }
  uint32_t fragments[4][4];
  weights(state, p.scale_log2, s, fragments);
  rescale(factor, o);

  ptx::pin(o);
  ptx::wgmma_fence();
  add_values(fragments, values(shared, slot, me.warpgroup), o);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::pin(o);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) release<1>(shared + slot.empty(half), me);
}

__device__ __forceinline__ void consume(const MlaDecodeParams& p, uint32_t shared, const Consumer& me) {
  const Rows rows(p, blockIdx.x);
  Slot slot;
  for_each_item(p, [&](int index, const Item& item) {
    uint32_t rope[4][4];
    load_queries(p, shared, me, rows, item.request, rope);
    RowState state = fresh_rows(p, me, rows, item);
    const int unmasked = unmasked_end(p, item);
    float other[2] = {0.0f,
                      0.0f};  // even and odd tiles have sums of their own, as in mla_decode.cu: they change places
    float o[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0.0f;
#pragma unroll 1
    for (int first = item.first; first < item.last; first += kDecodeKeys) {
      attend(p, shared, slot, me, rope, first, min(item.last - first, static_cast<int>(kDecodeKeys)),
             first + static_cast<int>(kDecodeKeys) > unmasked, state, other, o);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float sum = state.sum[side];
        state.sum[side] = other[side];
        other[side] = sum;
      }
      slot.advance();
    }
    ptx::bar_sync(kAllConsumers, kConsumers);  // nobody reads the queries any more
    const float sum[2] = {row_sum(state.sum[0]) + row_sum(other[0]), row_sum(state.sum[1]) + row_sum(other[1])};
    store_output(p, shared, me, rows, index, item, state.maximum, sum, o);
    ptx::bar_sync(kAllConsumers, kConsumers);  // nobody reads the output on its way any more
  });
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_simple(const __grid_constant__ dsv3::MlaDecodeParams p) {
  using namespace dsv3;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  ptx::griddepcontrol_launch_dependents();
  initialise_barriers<1>(shared, 1);
  ptx::griddepcontrol_wait();
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      Slot slot;
      for_each_item(p, [&](int, const Item& item) { load_tiles<1>(p, shared, slot, item, gridDim.x); });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(p, shared, Consumer(warp));
  }
}
