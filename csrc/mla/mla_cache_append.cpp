// Launcher of mla_cache_append. Arguments were checked in Python; here they
// become a grid and a parameter struct.
#include "mla/cache.h"
#include "mla/launchers.h"
#include "mla/mla_cache_append_params.h"

namespace dsv3 {

void mla_cache_append(const MlaCache& cache, const void* slots, const MlaBytes& latent, const MlaBytes& rope, bool fp8,
                      RowType type, bool pow2_scale, const Target& target) {
  static constexpr const char* kOp = "mla_cache_append";
  static constexpr const Kernel& kCopy = kernel("mla_cache_append_copy");
  static constexpr const Kernel* kFp8[] = {&kernel("mla_cache_append_fp8_f32"), &kernel("mla_cache_append_fp8_bf16"),
                                           &kernel("mla_cache_append_fp8_f16")};
  if (latent.rows == 0 || cache.pages == 0) return;
  if (latent.rows > INT32_MAX) throw Error("mla_cache_append: got more tokens than a grid covers");

  MlaCacheAppendParams params{};
  params.cache = static_cast<uint8_t*>(cache.data);
  params.slots = static_cast<const int64_t*>(slots);
  params.latent = static_cast<const uint8_t*>(latent.data);
  params.rope = static_cast<const uint8_t*>(rope.data);
  params.latent_stride = latent.stride;
  params.rope_stride = rope.stride;
  params.page_stride = cache.page_stride;
  params.places = cache.pages * cache.page;
  params.page_shift = cache.page_shift();
  params.tokens = static_cast<uint32_t>(latent.rows);
  params.row_bytes = static_cast<uint32_t>(cache.row_bytes);
  params.latent_bytes = static_cast<uint32_t>(latent.bytes);
  params.rope_bytes = static_cast<uint32_t>(rope.bytes);
  params.vectors = fp8 ? latent.aligned_to(16) : cache.aligned_to(16) && latent.aligned_to(16) && rope.aligned_to(16);
  params.pow2_scale = pow2_scale;

  Driver::of(kOp, target)
      .launch(kOp, fp8 ? *kFp8[static_cast<int>(type)] : kCopy, cache_grid(latent.rows), params, target,
              {{slots, static_cast<size_t>(latent.rows * 8), Access::kRead},
               latent.buffer(Access::kRead),
               rope.buffer(Access::kRead),
               cache.buffer(Access::kWrite)});
}

}  // namespace dsv3
