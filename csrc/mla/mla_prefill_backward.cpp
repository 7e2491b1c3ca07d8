// Launcher of mla_prefill_backward: four kernels in a row. Arguments were checked in Python.
#include "mla/launchers.h"
#include "mla/mla_prefill_backward_params.h"
#include "mla/prefill_launch.h"

namespace dsv3 {

void mla_prefill_backward(const PrefillInputs& x, const PrefillGradients& y, int num_sms, const Target& target) {
  static constexpr const char* kOp = "mla_prefill_backward";
  static constexpr const Kernel& kDelta = kernel("mla_prefill_backward_delta");
  static constexpr const Kernel& kKeys = kernel("mla_prefill_backward_keys");
  static constexpr const Kernel& kQueries = kernel("mla_prefill_backward_queries");
  static constexpr const Kernel& kRope = kernel("mla_prefill_backward_rope");
  static_assert(kKeys.threads == kBackwardThreads && kKeys.shared_bytes == kBackwardSharedBytes);
  static_assert(kQueries.threads == kBackwardThreads && kQueries.shared_bytes == kBackwardSharedBytes);
  static_assert(kDelta.threads == kDeltaThreads && kRope.threads == kRopeSumThreads);
  const int64_t queries = x.q.outer, heads = x.q.inner, keys = x.k_rope.inner, rows = queries * heads;
  if (heads == 0) return;
  const int64_t key_tiles = most_tiles(keys, 128, x.sequences, y.head_groups);
  const int64_t query_tiles = most_tiles(queries, 128, x.sequences, heads);
  constexpr int64_t kMost = INT32_MAX - (1 << 20);
  const int64_t delta_ctas = (rows + kDeltaThreads / 16 - 1) / (kDeltaThreads / 16);
  const int64_t rope_ctas = (keys * 16 + kRopeSumThreads - 1) / kRopeSumThreads;
  if (std::max({key_tiles, query_tiles, queries, keys, delta_ctas, rope_ctas}) > kMost) {
    throw Error("mla_prefill_backward: got more rows than 32 bits count");
  }

  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = sms_of(driver, target, num_sms);
  const auto grid = [](int64_t ctas) { return Dim3{static_cast<unsigned>(ctas), 1, 1}; };
  const auto bytes = [](const void* data, int64_t count, int64_t size, Access access) {
    return Buffer{data, static_cast<size_t>(count * size), access};
  };

  if (rows > 0) {
    const MlaPrefillDeltaParams delta{y.out, y.grad_out.data, static_cast<float*>(y.delta), rows};
    driver.launch(kOp, kDelta, grid(delta_ctas), delta, target,
                  {bytes(y.out, rows * 128, 2, Access::kRead), bytes(y.grad_out.data, rows * 128, 2, Access::kRead),
                   bytes(y.delta, rows, 4, Access::kWrite)});
  }

  MlaPrefillBackwardParams params{};
  params.q = head_map(driver, kOp, "q", x.q, 64);
  params.grad_out = head_map(driver, kOp, "grad_out", y.grad_out, 64);
  params.k_nope = head_map(driver, kOp, "k_nope", x.k_nope, 64);
  params.k_rope = shared_map(driver, kOp, "k_rope", x.k_rope, 64);
  params.v = head_map(driver, kOp, "v", x.v, 64);
  params.lse = static_cast<const float*>(y.lse);
  params.delta = static_cast<const float*>(y.delta);
  params.grad_q = y.grad_q;
  params.grad_k_nope = y.grad_k_nope;
  params.grad_v = y.grad_v;
  params.rope_parts = static_cast<float*>(y.rope_parts);
  params.cu_q = static_cast<const int32_t*>(x.cu_q);
  params.cu_k = static_cast<const int32_t*>(x.cu_k);
  params.sequences = static_cast<int32_t>(x.sequences);
  params.queries = static_cast<int32_t>(queries);
  params.keys = static_cast<int32_t>(keys);
  params.heads = static_cast<int32_t>(heads);
  params.head_groups = static_cast<int32_t>(y.head_groups);
  params.group_heads = static_cast<int32_t>((heads + y.head_groups - 1) / y.head_groups);
  params.scale = x.scale;
  params.causal = x.causal;

  const Buffer cu_q = bytes(x.cu_q, x.sequences + 1, 4, Access::kRead);
  const Buffer cu_k = bytes(x.cu_k, x.sequences + 1, 4, Access::kRead);
  const Buffer lse = bytes(y.lse, rows, 4, Access::kRead), delta = bytes(y.delta, rows, 4, Access::kRead);
  const auto launch = [&](const Kernel& which, int64_t tiles) {
    driver.launch(
        kOp, which, grid(std::min(tiles, sms)), params, target,
        {buffer(x.q, Access::kRead), buffer(y.grad_out, Access::kRead), buffer(x.k_nope, Access::kRead),
         buffer(x.k_rope, Access::kRead), buffer(x.v, Access::kRead), lse, delta, cu_q, cu_k,
         bytes(y.grad_q, rows * 192, 2, Access::kWrite), bytes(y.grad_k_nope, keys * heads * 128, 2, Access::kWrite),
         bytes(y.grad_v, keys * heads * 128, 2, Access::kWrite),
         bytes(y.rope_parts, y.head_groups * keys * 64, 4, Access::kWrite)});
  };
  if (keys > 0) {
    launch(kKeys, key_tiles);
    const MlaPrefillRopeParams rope{static_cast<const float*>(y.rope_parts), y.grad_k_rope, keys * 64,
                                    static_cast<int32_t>(y.head_groups)};
    driver.launch(kOp, kRope, grid(rope_ctas), rope, target,
                  {bytes(y.rope_parts, y.head_groups * keys * 64, 4, Access::kRead),
                   bytes(y.grad_k_rope, keys * 64, 2, Access::kWrite)});
  }
  if (rows > 0) launch(kQueries, query_tiles);
}

}  // namespace dsv3
