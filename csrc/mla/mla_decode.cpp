// Launchers of mla_decode: by a plan, with the joining of requests in several items; or on a cluster for each request.
#include <algorithm>
#include <limits>

#include "host/tensor_map.h"
#include "mla/decode_launchers.h"
#include "mla/mla_decode_params.h"

namespace dsv3 {
namespace {

constexpr const char* kOp = "mla_decode";

// The row of a kernel made of decode_tile.cuh; one that does not say what that needs does not compile.
constexpr const Kernel& decode_kernel(std::string_view name, unsigned cluster = 1,
                                      unsigned shared_bytes = kDecodeSharedBytes) {
  const Kernel& row = kernel(name);
  if (row.threads != kDecodeThreads || row.shared_bytes != shared_bytes || row.cluster != cluster) {
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

size_t words(int64_t count) { return static_cast<size_t>(count) * 4; }

// A call without its plan: what the kernels are told, and the memory that they touch.
struct Call {
  MlaDecodeParams params{};
  unsigned row_blocks = 0;
  Buffer q, cache, table, lengths, out, lse;

  Call(Driver& driver, const DecodeRows& queries, const DecodeCache& kv, const DecodeTable& entries,
       const void* lengths_of, double softmax_scale, bool causal, const DecodeRows& outputs, void* lse_of)
      : q{queries.data, span(queries, kDecodeWidth), Access::kRead},
        lengths{lengths_of, words(queries.requests), Access::kRead},
        out{outputs.data, span(outputs, kDecodeLatent), Access::kWrite},
        lse{lse_of, words(queries.requests * queries.queries * queries.heads), Access::kWrite} {
    const int64_t rows = queries.queries * queries.heads;
    const bool keys = kv.pages > 0 && entries.entries > 0;
    const int64_t row_elements = kv.fp8 ? kDecodeFp8Bytes : kDecodeWidth;
    cache = {
        kv.data,
        keys ? static_cast<size_t>((kv.pages - 1) * kv.page_stride + kv.page * row_elements) * (kv.fp8 ? 1 : 2) : 0,
        Access::kRead};
    table = {entries.data, keys ? words((entries.requests - 1) * entries.request_stride + entries.entries) : 0,
             Access::kRead};
    row_blocks = static_cast<unsigned>((rows + kDecodeRows - 1) / kDecodeRows);
    if (keys && kv.fp8) {
      params.cache = static_cast<const uint8_t*>(kv.data);
      params.cache_page_stride = kv.page_stride;
    } else if (keys) {
      const int64_t page_stride = kv.pages > 1 ? kv.page_stride : kv.page * kDecodeWidth;
      params.cache_map =
          tensor_map_3d(driver, kOp, "kv_cache", CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kv.data, kv.pages, kv.page,
                        kDecodeWidth, page_stride, kDecodeWidth, 1,
                        static_cast<uint32_t>(std::min<int64_t>(kv.page, kDecodeKeys)), 64, CU_TENSOR_MAP_SWIZZLE_128B);
    }
    params.q = static_cast<const uint16_t*>(queries.data);
    params.q_request_stride = queries.request_stride;
    params.q_query_stride = queries.query_stride;
    params.q_head_stride = queries.head_stride;
    params.out = static_cast<uint16_t*>(outputs.data);
    params.out_request_stride = outputs.request_stride;
    params.out_query_stride = outputs.query_stride;
    params.out_head_stride = outputs.head_stride;
    params.lse = static_cast<float*>(lse_of);
    params.table = static_cast<const int32_t*>(entries.data);
    params.table_stride = entries.request_stride;
    params.lengths = static_cast<const int32_t*>(lengths_of);
    params.queries = static_cast<int32_t>(queries.queries);
    params.heads = static_cast<int32_t>(queries.heads);
    params.rows = static_cast<int32_t>(rows);
    while (int64_t{1} << params.page_bits < kv.page) ++params.page_bits;
    // Keys are counted in 32 bits, and a tile's end must be too.
    params.max_keys = keys ? static_cast<int32_t>(std::min<int64_t>(
                                 entries.entries * kv.page, std::numeric_limits<int32_t>::max() - 2 * kDecodeKeys))
                           : 0;
    params.scale_log2 = static_cast<float>(softmax_scale * 1.4426950408889634);
    params.causal = causal;
    params.q_vectors = aligned(queries);
    params.out_vectors = aligned(outputs);
  }
};

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
  Call call(driver, q, cache, table, lengths, softmax_scale, causal, out, lse);
  call.params.partial_out = static_cast<float*>(workspace);
  call.params.partial_lse = call.params.partial_out + plan.items * rows * kDecodeLatent;
  call.params.work = static_cast<const int32_t*>(plan.work);
  call.params.splits = static_cast<const int32_t*>(plan.splits);
  call.params.bounds = static_cast<const int32_t*>(plan.bounds);
  const Buffer splits{plan.splits, words(q.requests + 1), Access::kRead};
  const size_t workspace_bytes = workspace != nullptr ? words(plan.items * rows * (kDecodeLatent + 1)) : 0;
  const Kernel& attention = cache.fp8 ? kFp8 : simple ? kSimple : call.row_blocks % 2 == 0 ? kPair : kBf16;
  driver.launch(kOp, attention, {call.row_blocks, static_cast<unsigned>(plan.parts), 1}, call.params, target,
                {call.q,
                 call.cache,
                 call.table,
                 call.lengths,
                 {plan.work, words(4 * plan.items), Access::kRead},
                 splits,
                 {plan.bounds, words(plan.parts + 1), Access::kRead},
                 call.out,
                 call.lse,
                 {workspace, workspace_bytes, Access::kWrite}});
  if (workspace == nullptr) return;  // no plan of this shape has a request in several items
  const int64_t groups = (rows + kCombineRows - 1) / kCombineRows;
  if (groups * q.requests > std::numeric_limits<int32_t>::max()) {
    throw Error("mla_decode: q: more rows than a grid covers");
  }
  LaunchOptions options;
  options.early = true;
  driver.launch(kOp, kCombine, {static_cast<unsigned>(groups * q.requests), 1, 1}, call.params, target,
                {splits, call.out, call.lse, {workspace, workspace_bytes, Access::kRead}}, options);
}

void mla_decode_cluster(const DecodeRows& q, const DecodeCache& cache, const DecodeTable& table, const void* lengths,
                        double softmax_scale, bool causal, const DecodeRows& out, void* lse, int64_t cluster,
                        const Target& target) {
  static constexpr const Kernel& kBf16 =
      decode_kernel("mla_decode_bf16_cluster", kDecodeMaxCluster, kDecodeClusterSharedBytes);
  static constexpr const Kernel& kFp8 =
      decode_kernel("mla_decode_fp8_cluster", kDecodeMaxCluster, kDecodeClusterSharedBytes);
  if (cluster != 2 && cluster != 4 && cluster != 8) {
    throw Error("mla_decode: cluster: got " + std::to_string(cluster) + ", wanted 2, 4 or 8");
  }
  const int64_t rows = q.queries * q.heads;
  if (q.requests == 0 || rows == 0) return;
  constexpr int64_t kMaxGrid = 65535;
  if (q.requests > kMaxGrid || rows > kMaxGrid * kDecodeRows) {
    throw Error("mla_decode: q: more rows than a grid covers");
  }

  Driver& driver = Driver::of(kOp, target);
  const Call call(driver, q, cache, table, lengths, softmax_scale, causal, out, lse);
  LaunchOptions options;
  options.cluster = static_cast<unsigned>(cluster);
  driver.launch(kOp, cache.fp8 ? kFp8 : kBf16, {options.cluster, call.row_blocks, static_cast<unsigned>(q.requests)},
                call.params, target, {call.q, call.cache, call.table, call.lengths, call.out, call.lse}, options);
}

}  // namespace dsv3
