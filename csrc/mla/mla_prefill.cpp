// Launcher of mla_prefill. Arguments were checked in Python; here they become tensor maps, a grid and a struct.
#include "mla/launchers.h"
#include "mla/mla_prefill_params.h"
#include "mla/prefill_launch.h"

namespace dsv3 {

void mla_prefill(const PrefillInputs& x, void* out, void* lse, int num_sms, const Target& target) {
  static constexpr const char* kOp = "mla_prefill";
  static constexpr const Kernel& kKernel = kernel("mla_prefill_128x128");
  static_assert(kKernel.threads == kPrefillThreads && kKernel.shared_bytes == kPrefillSharedBytes);
  const int64_t queries = x.q.outer, heads = x.q.inner, keys = x.k_rope.inner;
  if (queries == 0 || heads == 0) return;
  const int64_t tiles = most_tiles(queries, 128, x.sequences, heads);
  constexpr int64_t kMost = INT32_MAX - (1 << 20);
  if (tiles > kMost || queries > kMost || keys > kMost) throw Error("mla_prefill: got more rows than 32 bits count");

  Driver& driver = Driver::of(kOp, target);
  MlaPrefillParams params{};
  params.q = head_map(driver, kOp, "q", x.q, 128);
  params.k_nope = head_map(driver, kOp, "k_nope", x.k_nope, 128);
  params.k_rope = shared_map(driver, kOp, "k_rope", x.k_rope, 128);
  params.v = head_map(driver, kOp, "v", x.v, 128);
  params.out = out;
  params.lse = static_cast<float*>(lse);
  params.cu_q = static_cast<const int32_t*>(x.cu_q);
  params.cu_k = static_cast<const int32_t*>(x.cu_k);
  params.sequences = static_cast<int32_t>(x.sequences);
  params.queries = static_cast<int32_t>(queries);
  params.keys = static_cast<int32_t>(keys);
  params.heads = static_cast<int32_t>(heads);
  params.scale = x.scale;
  params.causal = x.causal;

  driver.launch(kOp, kKernel, {static_cast<unsigned>(std::min(tiles, sms_of(driver, target, num_sms))), 1, 1}, params,
                target,
                {buffer(x.q, Access::kRead),
                 buffer(x.k_nope, Access::kRead),
                 buffer(x.k_rope, Access::kRead),
                 buffer(x.v, Access::kRead),
                 {x.cu_q, static_cast<size_t>(x.sequences + 1) * 4, Access::kRead},
                 {x.cu_k, static_cast<size_t>(x.sequences + 1) * 4, Access::kRead},
                 {out, static_cast<size_t>(queries * heads * 128) * 2, Access::kWrite},
                 {lse, static_cast<size_t>(queries * heads) * 4, Access::kWrite}});
}

}  // namespace dsv3
