// Stand-ins for rivals' kernels: the same parameters, plain arithmetic. What the benchmarks' launching side gives them
// (pointers, sizes, tensor maps, structs, grids) decides whether their results are right.
#include "ptx/convert.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace rivals {
namespace {

constexpr int kThreads = 128, kBlock = 32, kDepth = 128;  // tiles of 32 x 32, 128 of K at a time

enum class Kind { kDense, kContiguous, kMasked, kAccumulate, kGrouped };

struct Shared {
  uint8_t a[kBlock * kDepth];
  uint8_t b[kBlock * kDepth];
  uint8_t d[kBlock * kBlock * 4];
  float a_scale[kBlock], b_scale[kBlock];
  uint64_t barrier;
};

__device__ __forceinline__ float e4m3(uint8_t code) {
  const uint32_t halves = ptx::cvt_rn_f16x2_e4m3x2(code);
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(halves));
  return value;
}

// Byte `at` of row `row` under a tensor map's 128-byte swizzle.
__device__ __forceinline__ int swizzled(int row, int at) { return row * 128 + (at ^ row % 8 << 4); }

struct Gemm {
  uint32_t m, n, k;
  const float* sfb;  // 128x128 scales of B, or null
  const int* layout;
  const uint8_t *a, *b;  // grouped by K: a matrix per group, else null
  const TensorMap *map_a, *map_b, *map_d, *map_sfa, *map_sfb;
};

template <Kind kind>
__device__ __forceinline__ void tile(const Gemm& g, Shared& s, uint32_t& phase, int row, int column, int group,
                                     int depth, int begin) {
  const uint32_t barrier = ptx::cvta_to_shared(&s.barrier);
  const int a_row = row + (kind == Kind::kMasked ? group * g.m : 0);
  const int b_row = column + (kind == Kind::kContiguous || kind == Kind::kMasked ? group * g.n : 0);
  const int k_blocks = (g.k + kDepth - 1) / kDepth;
  float sum[kBlock * kBlock / kThreads] = {};
  for (int at = 0; at < depth; at += kDepth) {
    const int block = at / kDepth;
    if (threadIdx.x == 0) {
      uint32_t bytes = 4 * kBlock + (g.map_sfb ? 4 * kBlock : 0) + (g.map_a ? sizeof s.a + sizeof s.b : 0);
      ptx::mbarrier_arrive_expect_tx(barrier, bytes);
      if (g.map_a) {
        ptx::cp_async_bulk_tensor_2d_g2s(ptx::cvta_to_shared(s.a), g.map_a, barrier, at, a_row);
        ptx::cp_async_bulk_tensor_2d_g2s(ptx::cvta_to_shared(s.b), g.map_b, barrier, at, b_row);
      }
      const int scale_row = begin / kDepth + block + (kind == Kind::kMasked ? group * k_blocks : 0);
      ptx::cp_async_bulk_tensor_2d_g2s(ptx::cvta_to_shared(s.a_scale), g.map_sfa, barrier, row, scale_row);
      if (g.map_sfb) {
        ptx::cp_async_bulk_tensor_2d_g2s(ptx::cvta_to_shared(s.b_scale), g.map_sfb, barrier, column, scale_row);
      }
    }
    ptx::mbarrier_wait_parity(barrier, phase & 1);
    ++phase;
    for (int i = 0; i < kBlock * kBlock / kThreads; ++i) {
      const int r = (threadIdx.x + i * kThreads) / kBlock, c = threadIdx.x % kBlock;
      float part = 0;
      for (int j = 0; j < kDepth; ++j) {
        const uint8_t x = g.map_a ? s.a[swizzled(r, j)] : g.a[(begin * g.m) + (row + r) * depth + at + j];
        const uint8_t y = g.map_a ? s.b[swizzled(c, j)] : g.b[(begin * g.n) + (column + c) * depth + at + j];
        part += e4m3(x) * e4m3(y);
      }
      const int of_b = g.sfb ? (group * ((g.n + 127) / 128) + (column + c) / 128) * k_blocks + block : 0;
      sum[i] += part * s.a_scale[r] * (g.sfb ? g.sfb[of_b] : s.b_scale[c]);
    }
    __syncthreads();
  }
  for (int i = 0; i < kBlock * kBlock / kThreads; ++i) {
    const int r = (threadIdx.x + i * kThreads) / kBlock, c = threadIdx.x % kBlock;
    if constexpr (kind == Kind::kAccumulate || kind == Kind::kGrouped) {
      reinterpret_cast<float*>(s.d)[r * kBlock + c] = sum[i];
    } else {  // rows of 64 bytes, 64-byte swizzle
      const uint16_t bits = static_cast<uint16_t>(ptx::cvt_rn_bf16x2_f32(sum[i], 0));
      *reinterpret_cast<uint16_t*>(s.d + r * 64 + (2 * c ^ r / 2 % 4 << 4)) = bits;
    }
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t d = ptx::cvta_to_shared(s.d);
    if constexpr (kind == Kind::kAccumulate || kind == Kind::kGrouped) {
      ptx::cp_reduce_async_bulk_tensor_2d_add(g.map_d, d, column, row + group * g.m);
    } else {
      ptx::cp_async_bulk_tensor_2d_s2g(g.map_d, d, column, a_row);
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
  __syncthreads();
}

template <Kind kind>
__device__ __forceinline__ void gemm(const Gemm& g, int groups) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::cvta_to_shared(&s.barrier), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  uint32_t phase = 0;
  const int rows = (g.m + kBlock - 1) / kBlock, columns = (g.n + kBlock - 1) / kBlock;
  for (int i = blockIdx.x; i < rows * columns * groups; i += gridDim.x) {
    const int row = i / columns % rows * kBlock, column = i % columns * kBlock;
    int group = i / columns / rows, depth = g.k, begin = 0;
    if constexpr (kind == Kind::kContiguous) {
      group = g.layout[row];
      if (group < 0) continue;
    }
    if constexpr (kind == Kind::kMasked) {
      if (row >= g.layout[group]) continue;
    }
    if constexpr (kind == Kind::kGrouped) {
      for (int before = 0; before < group; ++before) begin += g.layout[before];
      depth = g.layout[group];
    }
    tile<kind>(g, s, phase, row, column, group, depth, begin);
  }
}

}  // namespace

#define RIVALS_1D2D(name, kind, groups)                                                                      \
  extern "C" __global__ void __launch_bounds__(128)                                                          \
      name(float* sfb, int* layout, uint32_t m, uint32_t n, uint32_t k, const __grid_constant__ TensorMap a, \
           const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap d,                         \
           const __grid_constant__ TensorMap sfa) {                                                          \
    gemm<kind>({m, n, k, sfb, layout, nullptr, nullptr, &a, &b, &d, &sfa, nullptr}, groups);                 \
  }
#define RIVALS_1D1D(name, kind, groups)                                                                                \
  extern "C" __global__ void __launch_bounds__(128) name(                                                              \
      uint8_t* gmem_a, uint8_t* gmem_b, int* layout, TensorMap* buffer, uint32_t m, uint32_t n, uint32_t k,            \
      const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap sfa, \
      const __grid_constant__ TensorMap sfb, const __grid_constant__ TensorMap d) {                                    \
    const bool grouped = kind == Kind::kGrouped;                                                                       \
    if (grouped && threadIdx.x == 0) buffer[4 * blockIdx.x + 3].opaque[15] = 0; /* a CTA has four maps of it */        \
    gemm<kind>({m, n, k, nullptr, layout, gmem_a, gmem_b, grouped ? nullptr : &a, &b, &d, &sfa, &sfb}, groups);        \
  }

RIVALS_1D2D(rival_gemm, Kind::kDense, 1)
RIVALS_1D2D(rival_contiguous, Kind::kContiguous, 1)
RIVALS_1D2D(rival_masked, Kind::kMasked, 3)
RIVALS_1D1D(rival_accumulate, Kind::kAccumulate, 1)
RIVALS_1D1D(rival_k_grouped, Kind::kGrouped, 3)

// FlashMLA's: a request is cut into two parts, even and odd pages, which "combine" joins.

struct PlanParams {
  int b, s_q, block_size_n, overhead, topk, extra_topk;
  int *topk_length, *extra_topk_length, *seqlens, *metadata, *num_splits;
  int parts;
  void* stream;
};

struct DecodeParams {
  int b, s_q, rows, d, d_v, h_q, h_k, num_blocks, heads;
  bool is_causal;
  float scale, scale_log2;
  const uint16_t *q, *k;
  uint16_t* o;
  float* lse;
  int64_t q_batch, k_batch, o_batch, q_row, k_row, o_row, q_head, k_head, o_head;
  const int* table;
  int64_t table_batch;
  int page;
  const int *seqlens, *metadata;
  int parts;
  const int* num_splits;
  int total;
  float *lse_part, *o_part;
  void* stream;
};

struct alignas(128) Copy {
  TensorMap map;
  char aux[128];
};
struct MapParams {
  alignas(128) int q_shape[4];
  Copy q;
  alignas(128) int k_shape[2];
  Copy k;
  alignas(128) int o_shape[4];
  Copy o;
};

struct CombineParams {
  int b, s_q, h_q, d_v;
  float* lse;
  uint16_t* out;
  int lse_b, lse_s, o_b, o_s, o_h;
  const float *lse_part, *o_part;
  int lse_part_split, lse_part_s, o_part_split, o_part_s, o_part_h;
  const int *metadata, *num_splits;
  int parts;
  const float* sink;
  void* stream;
};

namespace {

__device__ __forceinline__ float bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// One part of one row of queries: 64 threads; `q` and the pages come through the maps.
__device__ __forceinline__ void attend(const DecodeParams& p, const MapParams& maps, uint32_t ready, uint32_t& phase,
                                       int request, int part, int row) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ float scores[64];
  uint8_t *q = memory, *k = memory + 9 * 8192;
  const auto load = [&](uint8_t* to, const TensorMap* map, int c1, int c3) {
    if (threadIdx.x != 0) return;
    for (int panel = 0; panel < 9; ++panel) {
      ptx::cp_async_bulk_tensor_4d_g2s(ptx::cvta_to_shared(to + panel * 8192), map, ready, 64 * panel, c1, 0, c3);
    }
  };
  const auto at = [](const uint8_t* tile, int r, int i) {
    return bf16(*reinterpret_cast<const uint16_t*>(tile + i / 64 * 8192 + swizzled(r, i % 64 * 2)));
  };
  const int length = p.seqlens[request], sees = length - (p.is_causal ? p.s_q - 1 - row / p.heads : 0);
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(ready, 9 * 8192);
  load(q, &maps.q.map, row / 64 * 64, request);
  ptx::mbarrier_wait_parity(ready, phase++ & 1);
  __syncthreads();  // nobody may still wait for this phase when the next one ends
  float top = -INFINITY, total = 0, sum[8] = {};
  for (int page = part; page * 64 < sees; page += 2) {
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(ready, 9 * 8192);
    load(k, &maps.k.map, 0, p.table[request * p.table_batch + page]);
    ptx::mbarrier_wait_parity(ready, phase++ & 1);
    float score = 0;
    for (int i = 0; i < p.d; ++i) score += at(q, row % 64, i) * at(k, threadIdx.x, i);
    scores[threadIdx.x] = page * 64 + static_cast<int>(threadIdx.x) < sees ? score * p.scale_log2 : -INFINITY;
    __syncthreads();
    float now = top;
    for (float s : scores) now = fmaxf(now, s);
    const float shrink = exp2f(top - now);
    total *= shrink, top = now;
    for (float& x : sum) x *= shrink;
    for (int j = 0; j < 64; ++j) {
      const float weight = exp2f(scores[j] - top);
      total += weight;
      for (int i = 0; i < 8; ++i) sum[i] += weight * at(k, j, threadIdx.x + 64 * i);
    }
    __syncthreads();
  }
  const int split = p.num_splits[request] + part;
  for (int i = 0; i < 8; ++i) {
    p.o_part[(static_cast<int64_t>(split) * p.rows + row) * p.d_v + threadIdx.x + 64 * i] =
        total > 0 ? sum[i] / total : 0;
  }
  if (threadIdx.x == 0) p.lse_part[split * p.rows + row] = total > 0 ? log2f(total) + top : -INFINITY;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32) rival_plan(const __grid_constant__ PlanParams p) {
  extern __shared__ int lengths[];  // 5 b + 1 words
  if (threadIdx.x != 0) return;
  for (int i = 0; i <= 5 * p.b; ++i) lengths[i] = 0;
  for (int i = 0; i <= p.b; ++i) p.num_splits[i] = 2 * i;
  for (int i = 0; i < 8 * p.parts; ++i) p.metadata[i] = 7;
}

// Part z of the grid takes every request of which it is the z-th in turn: each has two.
extern "C" __global__ void __launch_bounds__(64)
    rival_decode(const __grid_constant__ DecodeParams p, const __grid_constant__ MapParams maps) {
  __shared__ uint64_t barrier;
  const uint32_t ready = ptx::cvta_to_shared(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ready, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  uint32_t phase = 0;
  const bool contiguous = p.q_batch == p.rows * p.d && p.k_batch == 64 * p.d && p.o_batch == p.rows * p.d_v &&
                          p.q_row == p.d && p.k_row == p.d && p.o_row == p.d_v;
  if (p.metadata[8 * p.parts - 1] != 7 || !contiguous) return;
  const int rows = min(64, p.rows - 64 * static_cast<int>(blockIdx.x));
  for (int work = blockIdx.z; work < 2 * p.b * rows; work += gridDim.z) {
    attend(p, maps, ready, phase, work / rows / 2, work / rows % 2, 64 * blockIdx.x + work % rows);
    __syncthreads();
  }
  // The results' map: whatever is in shared memory goes there, for "combine" to overwrite.
  if (blockIdx.z != 0 || threadIdx.x != 0) return;
  extern __shared__ __align__(1024) uint8_t memory[];
  for (int i = 0; i < 8 * p.b; ++i) {
    const int panel = i % 8;
    ptx::cp_async_bulk_tensor_4d_s2g(&maps.o.map, ptx::cvta_to_shared(memory + panel * 8192), 64 * panel,
                                     64 * blockIdx.x, 0, i / 8);
  }
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
}

extern "C" __global__ void __launch_bounds__(256) rival_combine(const __grid_constant__ CombineParams p) {
  const int request = blockIdx.x / p.s_q, query = blockIdx.x % p.s_q, head = 8 * blockIdx.z + threadIdx.x / 32;
  if (head >= p.h_q) return;
  const int split = p.num_splits[request];
  const auto lse = [&](int part) {
    return p.lse_part[(split + part) * p.lse_part_split + query * p.lse_part_s + head];
  };
  const float top = fmaxf(lse(0), lse(1)), all = log2f(exp2f(lse(0) - top) + exp2f(lse(1) - top)) + top;
  for (int i = threadIdx.x % 32; i < p.d_v; i += 32) {
    float value = 0;
    for (int part = 0; part < 2; ++part) {
      const int64_t at = static_cast<int64_t>(split + part) * p.o_part_split + query * p.o_part_s + head * p.o_part_h;
      value += exp2f(lse(part) - all) * p.o_part[at + i];
    }
    p.out[request * p.o_b + query * p.o_s + head * p.o_h + i] = static_cast<uint16_t>(ptx::cvt_rn_bf16x2_f32(value, 0));
  }
  if (threadIdx.x % 32 == 0) p.lse[request * p.lse_b + query * p.lse_s + head] = all * 0.69314718f;
}

}  // namespace rivals
