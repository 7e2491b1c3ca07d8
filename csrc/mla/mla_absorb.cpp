// Launcher of mla_absorb. Arguments were checked in Python; here they become tensor maps, a tile, a grid and a struct.
#include <algorithm>

#include "mla/launchers.h"
#include "mla/mla_absorb_params.h"
#include "mla/prefill_launch.h"

namespace dsv3 {
namespace {

constexpr const char* kOp = "mla_absorb";

struct AbsorbTile {
  uint32_t rows, columns;
  const Kernel *k, *n;  // of a weight whose K is contiguous, or whose N is
};

// A tile whose rows of the table do not say what it needs does not compile.
constexpr AbsorbTile absorb_tile(uint32_t rows, uint32_t columns, std::string_view k, std::string_view n) {
  for (const Kernel* row : {&kernel(k), &kernel(n)}) {
    if (row->threads != absorb_threads(rows) || row->shared_bytes != absorb_shared_bytes(rows, columns)) {
      throw "not such a kernel";
    }
  }
  return {rows, columns, &kernel(k), &kernel(n)};
}
constexpr AbsorbTile kNarrow = absorb_tile(64, 64, "mla_absorb_64x64_k", "mla_absorb_64x64_n");
constexpr AbsorbTile kFew = absorb_tile(64, 128, "mla_absorb_64x128_k", "mla_absorb_64x128_n");
constexpr AbsorbTile kMany = absorb_tile(128, 128, "mla_absorb_128x128_k", "mla_absorb_128x128_n");

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 128 tokens where there are more than 64; the weights of few, in pieces half as wide where there are multiprocessors
// for them.
const AbsorbTile& choose(int64_t tokens, int64_t heads, int64_t columns, int64_t sms) {
  if (tokens > 64) return kMany;
  return heads * ceil_div(columns, 64) <= sms ? kNarrow : kFew;
}

}  // namespace

void mla_absorb(const MlaRows& x, const AbsorbWeight& weight, const MlaRows& out, const Target& target) {
  const int64_t tokens = x.outer, heads = x.inner, depth = x.columns, columns = out.columns;
  if (tokens == 0 || heads == 0 || columns == 0) return;
  Driver& driver = Driver::of(kOp, target);
  const int64_t sms = driver.multiprocessors(target);
  const AbsorbTile& tile = choose(tokens, heads, columns, sms);
  const int64_t token_tiles = ceil_div(tokens, tile.rows), column_tiles = ceil_div(columns, tile.columns);
  constexpr int64_t kMost = INT32_MAX - (1 << 20);  // a step of the grid, and a section of 8 heads, still fit
  if (tokens > kMost || columns > kMost || depth > kMost || token_tiles > kMost / 8 / column_tiles ||
      token_tiles * column_tiles > kMost / heads) {
    throw Error("mla_absorb: got more rows than 32 bits count");
  }

  const bool k_major = weight.column_stride != 1;
  const auto bf16_map = [&](const char* argument, const void* data, int64_t rows, int64_t width, int64_t head_stride,
                            int64_t row_stride, uint32_t box) {
    return tensor_map_3d(driver, kOp, argument, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, heads, rows, width,
                         heads > 1 ? head_stride : rows * row_stride, row_stride, 1, box, 64,
                         CU_TENSOR_MAP_SWIZZLE_128B);
  };
  MlaAbsorbParams params{};
  params.x = head_map(driver, kOp, "x", x, tile.rows);
  params.weight =
      k_major ? bf16_map("weight", weight.data, columns, depth, weight.head_stride, weight.column_stride, tile.columns)
              : bf16_map("weight", weight.data, depth, columns, weight.head_stride, weight.depth_stride, 64);
  params.vectors = rows_aligned(out, 16);
  if (params.vectors) params.out = head_map(driver, kOp, "out", out, 16);
  params.out_data = static_cast<uint16_t*>(const_cast<void*>(out.data));
  params.out_token_stride = out.outer_stride;
  params.out_head_stride = out.inner_stride;
  params.tokens = static_cast<int32_t>(tokens);
  params.heads = static_cast<int32_t>(heads);
  params.columns = static_cast<int32_t>(columns);
  params.blocks = static_cast<int32_t>(ceil_div(depth, 64));
  params.token_tiles = static_cast<int32_t>(token_tiles);
  params.column_tiles = static_cast<int32_t>(column_tiles);
  params.tiles = static_cast<int32_t>(token_tiles * column_tiles * heads);

  const int64_t weight_span =
      (heads - 1) * weight.head_stride + (columns - 1) * weight.column_stride + (depth - 1) * weight.depth_stride + 1;
  driver.launch(kOp, k_major ? *tile.k : *tile.n, {static_cast<unsigned>(std::min<int64_t>(params.tiles, sms)), 1, 1},
                params, target,
                {buffer(x, Access::kRead),
                 {weight.data, static_cast<size_t>(weight_span) * 2, Access::kRead},
                 buffer(out, Access::kWrite)});
}

}  // namespace dsv3
