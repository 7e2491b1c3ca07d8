// Launcher of mla_cache_gather. Arguments were checked in Python; here they
// become a grid and a parameter struct.
#include "mla/cache.h"
#include "mla/launchers.h"
#include "mla/mla_cache_gather_params.h"

namespace dsv3 {

void mla_cache_gather(const MlaCache& cache, const MlaTable& block_table, const void* cu_seqlens,
                      const MlaBytes& latent, const MlaBytes& rope, bool fp8, const Target& target) {
  static constexpr const char* kOp = "mla_cache_gather";
  static constexpr const Kernel& kCopy = kernel("mla_cache_gather_copy");
  static constexpr const Kernel& kFp8 = kernel("mla_cache_gather_fp8");
  if (latent.rows == 0) return;
  if (latent.rows > INT32_MAX) throw Error("mla_cache_gather: got more rows than a grid covers");

  MlaCacheGatherParams params{};
  params.cache = static_cast<const uint8_t*>(cache.data);
  params.block_table = static_cast<const int32_t*>(block_table.data);
  params.cu_seqlens = static_cast<const int32_t*>(cu_seqlens);
  params.latent = static_cast<uint8_t*>(latent.data);
  params.rope = static_cast<uint8_t*>(rope.data);
  params.page_stride = cache.page_stride;
  params.table_stride = block_table.row_stride;
  params.pages = cache.pages;
  params.page_shift = cache.page_shift();
  params.table_columns = static_cast<uint32_t>(block_table.columns);
  params.requests = static_cast<uint32_t>(block_table.rows);
  params.total = static_cast<uint32_t>(latent.rows);
  params.row_bytes = static_cast<uint32_t>(cache.row_bytes);
  params.latent_bytes = static_cast<uint32_t>(latent.bytes);
  params.rope_bytes = static_cast<uint32_t>(rope.bytes);
  params.vectors = cache.aligned_to(16) && latent.aligned_to(16) && rope.aligned_to(16);

  Driver::of(kOp, target)
      .launch(kOp, fp8 ? kFp8 : kCopy, cache_grid(latent.rows), params, target,
              {cache.buffer(Access::kRead),
               buffer(block_table),
               {cu_seqlens, static_cast<size_t>(block_table.rows + 1) * 4, Access::kRead},
               latent.buffer(Access::kWrite),
               rope.buffer(Access::kWrite)});
}

}  // namespace dsv3
