// Launcher of mla_decode: the attention, and the joining of requests in several items.
#include <algorithm>
#include <limits>

#include "host/tensor_map.h"
#include "mla/decode_launchers.h"
#include "mla/mla_decode_params.h"

namespace dsv3 {
namespace {

constexpr const char* kOp = "mla_decode";

// The row of a kernel made of decode_tile.cuh; one that does not say what that needs does not compile.
constexpr const Kernel& decode_kernel(std::string_view name, unsigned cluster = 1) {
  const Kernel& row = kernel(name);
  if (row.threads != kDecodeThreads || row.shared_bytes != kDecodeSharedBytes || row.cluster != cluster) {
    throw "not such a kernel";
  }
  return row;
}

size_t span(const DecodeRows& x, int64_t columns) {
  return static_cast<size_t>((x.requests - 1) * x.request_stride + (x.queries - 1) * x.query_stride +
                             (x.heads - 1) * x.head_stride + columns) *
         2;
}

bool aligned(const DecodeRows& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.requests == 1 || x.request_stride % 8 == 0) &&
         (x.queries == 1 || x.query_stride % 8 == 0) && (x.heads == 1 || x.head_stride % 8 == 0);
}

}  // namespace

void mla_decode(const DecodeRows& q, const DecodeCache& cache, const DecodeTable& table, const void* lengths,
                const DecodePlan& plan, double softmax_scale, bool causal, const DecodeRows& out, void* lse,
                void* workspace, bool simple, const Target& target) {
  static constexpr const Kernel& kBf16 = decode_kernel("mla_decode_bf16");
  static constexpr const Kernel& kPair = decode_kernel("mla_decode_bf16_pair", 2);
  static constexpr const Kernel& kFp8 = decode_kernel("mla_decode_fp8");
  static constexpr const Kernel& kSimple = decode_kernel("mla_decode_simple");
  static constexpr const Kernel& kCombine = kernel("mla_decode_combine");
  static_assert(kCombine.threads == kCombineThreads && kCombine.waits);
  const int64_t rows = q.queries * q.heads;
  if (q.requests == 0 || rows == 0) return;
  if (rows > std::numeric_limits<int32_t>::max() / 2) throw Error("mla_decode: q: more rows than a grid covers");

  Driver& driver = Driver::of(kOp, target);
  MlaDecodeParams params{};
  const bool keys = cache.pages > 0 && table.entries > 0;
  const int64_t page_stride = cache.pages > 1 ? cache.page_stride : cache.page * kDecodeWidth;
  if (keys && cache.fp8) {
    params.cache = static_cast<const uint8_t*>(cache.data);
    params.cache_page_stride = cache.page_stride;
  } else if (keys) {
    params.cache_map = tensor_map_3d(driver, kOp, "kv_cache", CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cache.data, cache.pages,
                                     cache.page, kDecodeWidth, page_stride, kDecodeWidth, 1,
                                     static_cast<uint32_t>(std::min<int64_t>(cache.page, kDecodeKeys)), 64,
                                     CU_TENSOR_MAP_SWIZZLE_128B);
  }
  params.q = static_cast<const uint16_t*>(q.data);
  params.q_request_stride = q.request_stride;
  params.q_query_stride = q.query_stride;
  params.q_head_stride = q.head_stride;
  params.out = static_cast<uint16_t*>(out.data);
  params.out_request_stride = out.request_stride;
  params.out_query_stride = out.query_stride;
  params.out_head_stride = out.head_stride;
  params.lse = static_cast<float*>(lse);
  params.partial_out = static_cast<float*>(workspace);
  params.partial_lse = params.partial_out + plan.items * rows * kDecodeLatent;
  params.table = static_cast<const int32_t*>(table.data);
  params.table_stride = table.request_stride;
  params.lengths = static_cast<const int32_t*>(lengths);
  params.work = static_cast<const int32_t*>(plan.work);
  params.splits = static_cast<const int32_t*>(plan.splits);
  params.bounds = static_cast<const int32_t*>(plan.bounds);
  params.queries = static_cast<int32_t>(q.queries);
  params.heads = static_cast<int32_t>(q.heads);
  params.rows = static_cast<int32_t>(rows);
  while (int64_t{1} << params.page_bits < cache.page) ++params.page_bits;
  // Keys are counted in 32 bits, and a tile's end must be too.
  params.max_keys = keys ? static_cast<int32_t>(std::min<int64_t>(
                               table.entries * cache.page, std::numeric_limits<int32_t>::max() - 2 * kDecodeKeys))
                         : 0;
  params.scale_log2 = static_cast<float>(softmax_scale * 1.4426950408889634);
  params.causal = causal;
  params.q_vectors = aligned(q);
  params.out_vectors = aligned(out);

  const auto words = [](int64_t count) { return static_cast<size_t>(count) * 4; };
  const size_t table_bytes = keys ? words((table.requests - 1) * table.request_stride + table.entries) : 0;
  const size_t cache_bytes =
      !keys       ? 0
      : cache.fp8 ? static_cast<size_t>((cache.pages - 1) * cache.page_stride + cache.page * kDecodeFp8Bytes)
                  : static_cast<size_t>((cache.pages - 1) * cache.page_stride + cache.page * kDecodeWidth) * 2;
  const Buffer splits{plan.splits, words(q.requests + 1), Access::kRead};
  const Buffer outputs{out.data, span(out, kDecodeLatent), Access::kWrite};
  const Buffer sums{lse, words(q.requests * rows), Access::kWrite};
  const size_t workspace_bytes = workspace != nullptr ? words(plan.items * rows * (kDecodeLatent + 1)) : 0;
  const unsigned row_blocks = static_cast<unsigned>((rows + kDecodeRows - 1) / kDecodeRows);
  const Kernel& attention = cache.fp8 ? kFp8 : simple ? kSimple : row_blocks % 2 == 0 ? kPair : kBf16;
  driver.launch(kOp, attention, {row_blocks, static_cast<unsigned>(plan.parts), 1}, params, target,
                {{q.data, span(q, kDecodeWidth), Access::kRead},
                 {cache.data, cache_bytes, Access::kRead},
                 {table.data, table_bytes, Access::kRead},
                 {lengths, words(q.requests), Access::kRead},
                 {plan.work, words(4 * plan.items), Access::kRead},
                 splits,
                 {plan.bounds, words(plan.parts + 1), Access::kRead},
                 outputs,
                 sums,
                 {workspace, workspace_bytes, Access::kWrite}});
  if (workspace == nullptr) return;  // no plan of this shape has a request in several items
  const int64_t groups = (rows + kCombineRows - 1) / kCombineRows;
  if (groups * q.requests > std::numeric_limits<int32_t>::max()) {
    throw Error("mla_decode: q: more rows than a grid covers");
  }
  LaunchOptions options;
  options.early = true;
  driver.launch(kOp, kCombine, {static_cast<unsigned>(groups * q.requests), 1, 1}, params, target,
                {splits, outputs, sums, {workspace, workspace_bytes, Access::kRead}}, options);
}

}  // namespace dsv3
