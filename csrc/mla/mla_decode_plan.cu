// mla_decode_plan: who does which keys (docs/mla.md). One CTA, since everything follows from prefix sums over the
// requests: of their cost, which says where the row of all requests is cut, and of their items, which says where each
// request's items stand. The requests pass in chunks of one per thread, twice: the total comes first.
#include "mla/mla_decode_plan_params.h"

namespace dsv3 {
namespace {

constexpr int kWarps = kPlanThreads / 32;

__device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inclusive prefix sum over the CTA's threads on top of `before`; `total` becomes the sum of all and `before`.
__device__ __forceinline__ int64_t prefix_sum(int64_t value, int64_t before, int64_t (&sums)[kWarps], int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += other;
  }
  __syncthreads();  // nobody still reads the sums of the last call
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  total = before;
  int64_t earlier = before;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) earlier += sums[w];
    total += sums[w];
  }
  return earlier + value;
}

__device__ __forceinline__ int64_t keys_of(const MlaDecodePlanParams& p, int request) {
  return request < p.requests ? max(p.lengths[request], 0) : 0;
}

__device__ __forceinline__ void write_item(const MlaDecodePlanParams& p, int64_t item, int request, int64_t first,
                                           int64_t last, int64_t split) {
  reinterpret_cast<int4*>(p.work)[item] =
      make_int4(request, static_cast<int>(first), static_cast<int>(last), static_cast<int>(split));
}

// A request is cut by its own length alone; parts then take equal numbers of items. Returns the number of items.
__device__ __forceinline__ int64_t plan_fixed(const MlaDecodePlanParams& p, int64_t (&sums)[kWarps]) {
  int64_t items = 0;
  for (int chunk = 0; chunk < p.requests; chunk += kPlanThreads) {
    const int request = chunk + threadIdx.x;
    const int64_t keys = keys_of(p, request);
    const int64_t blocks = max(ceil_div(ceil_div(keys, kPlanFixedSplits), kPlanKeyBlock),
                               static_cast<int64_t>(kPlanFixedKeys / kPlanKeyBlock));
    const int64_t size = blocks * kPlanKeyBlock;
    const int64_t count = request < p.requests ? max(ceil_div(keys, size), static_cast<int64_t>(1)) : 0;
    const int64_t end = prefix_sum(count, items, sums, items);
    if (request < p.requests) p.splits[request + 1] = static_cast<int>(end);
    for (int64_t split = 0; split < count; ++split) {
      write_item(p, end - count + split, request, split * size, min((split + 1) * size, keys), split);
    }
  }
  for (int part = threadIdx.x; part <= p.parts; part += kPlanThreads) {
    p.bounds[part] = static_cast<int>(part * items / p.parts);
  }
  return items;
}

// All requests stand in a row, each its start and then its blocks of keys; the row is cut into equal shares, and an
// item is what one share holds of one request.
__device__ __forceinline__ int64_t plan_balanced(const MlaDecodePlanParams& p, int64_t (&sums)[kWarps]) {
  int64_t whole = 0;
  for (int chunk = 0; chunk < p.requests; chunk += kPlanThreads) {
    const int request = chunk + threadIdx.x;
    const int64_t cost = request < p.requests ? ceil_div(keys_of(p, request), kPlanKeyBlock) + p.start_cost : 0;
    prefix_sum(cost, whole, sums, whole);
  }
  const int64_t share = max(ceil_div(whole, p.parts), static_cast<int64_t>(1));
  int64_t cost_before = 0, items = 0;
  for (int chunk = 0; chunk < p.requests; chunk += kPlanThreads) {
    const int request = chunk + threadIdx.x;
    const bool valid = request < p.requests;
    const int64_t keys = keys_of(p, request), blocks = ceil_div(keys, kPlanKeyBlock);
    const int64_t end = prefix_sum(valid ? blocks + p.start_cost : 0, cost_before, sums, cost_before);
    const int64_t start = end - blocks;  // of its keys
    const int64_t first = min(start, whole - 1) / share;
    const int64_t last = keys > 0 ? (end - 1) / share : first;
    const int64_t count = valid ? last - first + 1 : 0;
    const int64_t end_item = prefix_sum(count, items, sums, items), first_item = end_item - count;
    if (!valid) continue;
    p.splits[request + 1] = static_cast<int>(end_item);
    for (int64_t split = 0; split < count; ++split) {
      const int64_t part = first + split;
      write_item(p, first_item + split, request, max(part * share - start, static_cast<int64_t>(0)) * kPlanKeyBlock,
                 min(((part + 1) * share - start) * kPlanKeyBlock, keys), split);
      if (split > 0) p.bounds[part] = static_cast<int>(first_item + split);
    }
    // Parts without an item of their own before this one begin with it.
    int64_t previous = -1;
    if (request > 0) {
      const int64_t its_keys = keys_of(p, request - 1), its_end = end - blocks - p.start_cost;
      previous = its_keys > 0 ? (its_end - 1) / share : min(its_end, whole - 1) / share;
    }
    for (int64_t part = previous + 1; part <= first; ++part) p.bounds[part] = static_cast<int>(first_item);
    if (request == p.requests - 1) {
      for (int64_t part = last + 1; part <= p.parts; ++part) p.bounds[part] = static_cast<int>(end_item);
    }
  }
  if (p.requests == 0) {
    for (int part = threadIdx.x; part <= p.parts; part += kPlanThreads) p.bounds[part] = 0;
  }
  return items;
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kPlanThreads)
    mla_decode_plan(const __grid_constant__ dsv3::MlaDecodePlanParams p) {
  __shared__ int64_t sums[dsv3::kWarps];
  if (threadIdx.x == 0) p.splits[0] = 0;
  const int64_t items = p.fixed ? dsv3::plan_fixed(p, sums) : dsv3::plan_balanced(p, sums);
  for (int64_t item = items + threadIdx.x; item < p.items; item += dsv3::kPlanThreads) {
    dsv3::write_item(p, item, -1, -1, -1, -1);
  }
}
