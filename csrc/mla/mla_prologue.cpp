// Launcher of mla_prologue. Arguments were checked in Python; here they become a grid and a parameter struct.
#include "mla/launchers.h"
#include "mla/mla_prologue_params.h"

namespace dsv3 {

void mla_prologue(const PrologueInputs& x, const PrologueOutputs& y, const Target& target) {
  static constexpr const char* kOp = "mla_prologue";
  static constexpr const Kernel& kBFloat16 = kernel("mla_prologue_bf16");
  static constexpr const Kernel& kFp8 = kernel("mla_prologue_fp8");
  static_assert(kBFloat16.threads == kPrologueThreads && kFp8.threads == kPrologueThreads);
  const int64_t tokens = x.x.rows, blocks = (x.rank + 127) / 128;
  if (tokens == 0) return;
  if (tokens > INT32_MAX) throw Error("mla_prologue: got more tokens than a grid covers");

  MlaPrologueParams params{};
  params.x = x.x.data;
  params.q_weight = x.q_weight;
  params.kv_weight = x.kv_weight;
  params.positions = x.positions;
  params.cos_sin = static_cast<const float*>(x.cos_sin.data);
  params.slots = static_cast<const int64_t*>(x.slots);
  params.cache = static_cast<uint8_t*>(y.cache.data);
  params.q = static_cast<uint8_t*>(y.q);
  params.scale = static_cast<float*>(y.scale);
  params.latent = y.latent;
  params.k_rope = y.k_rope;
  params.x_stride = x.x.stride / 2;
  params.scale_row_stride = y.scale_row_stride;
  params.scale_block_stride = y.scale_block_stride;
  params.table_stride = x.cos_sin.row_stride;
  params.table_rows = x.cos_sin.rows;
  params.page_stride = y.cache.page_stride;
  params.places = y.cache.pages * y.cache.page;
  params.page_shift = y.cache.page_shift();
  params.tokens = static_cast<uint32_t>(tokens);
  params.rank = static_cast<int32_t>(x.rank);
  params.eps = static_cast<float>(x.eps);
  params.q_weight_type = static_cast<uint32_t>(x.q_weight_type);
  params.kv_weight_type = static_cast<uint32_t>(x.kv_weight_type);
  params.positions_are_int64 = x.positions_are_int64;
  params.pow2_scale = y.pow2_scale;
  params.cache_pow2_scale = y.cache_pow2_scale;

  const auto bytes = [](const void* data, int64_t count, Access access) {
    return Buffer{data, data == nullptr ? 0 : static_cast<size_t>(count), access};
  };
  Driver::of(kOp, target)
      .launch(kOp, y.cache.row_bytes == kFp8Row ? kFp8 : kBFloat16,
              {static_cast<unsigned>((tokens + kPrologueTokens - 1) / kPrologueTokens), 1, 1}, params, target,
              {x.x.buffer(Access::kRead), bytes(x.q_weight, x.rank * element_bytes(x.q_weight_type), Access::kRead),
               bytes(x.kv_weight, 512 * element_bytes(x.kv_weight_type), Access::kRead),
               bytes(x.positions, tokens * (x.positions_are_int64 ? 8 : 4), Access::kRead), buffer(x.cos_sin),
               bytes(x.slots, tokens * 8, Access::kRead), y.cache.buffer(Access::kWrite),
               bytes(y.q, tokens * x.rank, Access::kWrite),
               bytes(y.scale, ((tokens - 1) * y.scale_row_stride + (blocks - 1) * y.scale_block_stride + 1) * 4,
                     Access::kWrite),
               bytes(y.latent, tokens * 1024, Access::kWrite), bytes(y.k_rope, tokens * 128, Access::kWrite)});
}

}  // namespace dsv3
