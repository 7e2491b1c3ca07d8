// mla_prefill_backward: the gradients of mla_prefill, deterministic: no atomics, every sum in a fixed order.
//
// FlashAttention-2's backward (arXiv 2307.08691, section 3.1.2):
//   P = exp(scale * q k^T - lse), delta = rowsum(dO * O), dS = P * (dO V^T - delta)
//   dV = P^T dO, dK = scale * dS^T Q, dQ = scale * dS K
//
// Four kernels: _delta; _keys, where a CTA keeps 128 keys and their values and lets the queries pass by, for dK and dV;
// _queries, where it keeps 128 queries and the keys pass by, for dQ; _rope, the last sum of the rotary key's gradient.
// _keys and _queries are one body: what stays (128 rows) is A, on the M side, so that P and dS come out of the tensor
// cores in registers as the next product's A; what passes (64 rows) is B of all products. They compute P and dP twice
// (1152 multiplications per pair of query and key where 832 would do), and need neither atomics nor an order of CTAs.
//
// The rotary key is shared by the heads: a CTA of _keys takes the heads of a group one after the other and simply goes
// on adding up the last 64 columns of dK; _rope adds the groups in order.
//
// Roles      warp 0        tensor copies (one elected lane)
//            warp 1        log-sum-exps and deltas of the queries that pass, 4 bytes a lane (_keys)
//            warps 2, 3    leave at once
//            warps 4..11   two consumer warpgroups, 64 of the rows that stay each
// Barriers   kept_full     1 arrival with 81920 bytes         kept_empty   8 arrivals, one per consumer warp
//            full[3]       1 arrival with 40960 bytes (+ 32 as warp 1's copies land)    empty[3]   8 arrivals
//            named 1       both warpgroups have zeroed what lies past the sequence's end
// Registers  24 for the producers, 240 for the consumers: dK 96, dV 64, S or dP 32, P 16, dS 16
// Budget     cycles of 128 x 64 per SM, tensor cores and shared memory: _keys 2560 and 2240 (wgmma reads 240 KB, copies
//            write 40 KB), _queries 2048 and 1984; exp 512. Shared memory: 222784 bytes.
#include "mla/consumer.cuh"
#include "mla/mla_prefill_backward_params.h"
#include "mla/sequences.cuh"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/ring.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {
namespace {

constexpr int kKept = 128;    // rows that stay
constexpr int kPassing = 64;  // rows of a stage
constexpr int kStages = kBackwardStages;
constexpr int kConsumerWarps = 8;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
constexpr float kLog2E = 1.4426950408889634f;

// A panel is 64 columns: 128 bytes a row, as the swizzle wants it. 192 columns are 3 panels, then come 2 of 128.
constexpr uint32_t kBoxBytes = 64 * 128;
constexpr uint32_t kKeptPanel = kKept * 128;
constexpr uint32_t kKeptBytes = 5 * kKeptPanel;
constexpr uint32_t kPassingPanel = kPassing * 128;
constexpr uint32_t kPassingBytes = 5 * kPassingPanel;
constexpr uint32_t kStatBytes = 2 * kPassing * 4;
constexpr uint32_t kSlabBytes = 16 * 128;  // of one warp's output: 16 rows of 64 columns

constexpr uint32_t kRing = kKeptBytes;
constexpr uint32_t kStats = kRing + kStages * kPassingBytes;
constexpr uint32_t kSlabs = kStats + kStages * kStatBytes;
constexpr uint32_t kKeptFull = kSlabs + kConsumerWarps * kSlabBytes;
constexpr uint32_t kKeptEmpty = kKeptFull + 8;
constexpr uint32_t kFull = kKeptEmpty + 8;
constexpr uint32_t kEmpty = kFull + 8 * kStages;
constexpr uint32_t kBytes = kEmpty + 8 * kStages;

static_assert(kBytes == kBackwardSharedBytes, "what the launcher asks for");
static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
static_assert(kSlabs % 128 == 0, "no bank is met twice by a row");
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg.inc would wait for ever");
static_assert(kBackwardThreads == 128 + 32 * kConsumerWarps, "one warpgroup for the producers, two consumers");

enum class Keep { kKeys, kQueries };

using Slot = ptx::RingSlot<kStages>;

// What a CTA works on: rows that stay, from a sequence, and the blocks of 64 that pass by.
struct Work {
  int first_head, last_head;
  int row, left;   // first row that stays, in its tensor; rows of the sequence from there on
  int passing;     // first row of the sequence in the tensor of what passes
  int count;       // how many there are
  int begin, end;  // blocks of them that matter
  int offset;      // causal: kept row r sees the passing rows from offset + r on (_keys), or up to it (_queries)
};

// visit(work): this CTA's tiles, in the same order for every warp. Longest first where causal: the first keys are seen
// by most queries, the last queries see most keys.
template <Keep kKeep, class Visit>
__device__ __forceinline__ void for_each_tile(const MlaPrefillBackwardParams& p, Visit visit) {
  const Sequences queries{p.cu_q, p.sequences, p.queries}, keys{p.cu_k, p.sequences, p.keys};
  constexpr bool kKeys = kKeep == Keep::kKeys;
  const int columns = kKeys ? p.head_groups : p.heads;
  const auto rows_of = [&](int group) { return dsv3::rows_of(kKeys ? keys : queries, group); };
  GroupWalk<kKept> walk;
  GroupTile tile;
  for (int t = blockIdx.x; walk.find(t, p.sequences + 2, columns, rows_of, tile); t += gridDim.x) {
    const RowRange other = partners_of(kKeys ? queries : keys, tile.group);
    const int row_tiles = (tile.rows.count + kKept - 1) / kKept;
    const int column = tile.tile / row_tiles, place = tile.tile % row_tiles;
    const int first = (kKeys ? place : row_tiles - 1 - place) * kKept;
    Work work;
    work.first_head = kKeys ? column * p.group_heads : column;
    work.last_head = kKeys ? min(work.first_head + p.group_heads, p.heads) - 1 : column;
    work.row = tile.rows.begin + first;
    work.left = tile.rows.count - first;
    work.passing = other.begin;
    work.count = other.count;
    work.begin = 0;
    work.end = (other.count + kPassing - 1) / kPassing;
    if (kKeys) {  // key k is seen by the queries from k - (keys - queries) on
      work.offset = p.causal ? first - (tile.rows.count - other.count) : -kKept;
      work.begin = min(max(work.offset, 0) / kPassing, work.end);
    } else {  // query i sees the keys up to i + keys - queries
      work.offset = p.causal ? first + other.count - tile.rows.count : other.count;
      const int seen = min(other.count, work.offset + min(kKept, work.left));
      work.end = (max(seen, 0) + kPassing - 1) / kPassing;
    }
    visit(work);
  }
}

// 64 rows from `row` on of one head: 192 columns of queries or keys, or 128 of output gradients or values.
template <bool kKeys>
__device__ __forceinline__ void load_wide(const MlaPrefillBackwardParams& p, uint32_t to, uint32_t panel, uint32_t full,
                                          int row, int head) {
  if (kKeys) {
    ptx::cp_async_bulk_tensor_3d_g2s(to, &p.k_nope, full, 0, row, head);
    ptx::cp_async_bulk_tensor_3d_g2s(to + panel, &p.k_nope, full, 64, row, head);
    ptx::cp_async_bulk_tensor_2d_g2s(to + 2 * panel, &p.k_rope, full, 0, row);
  } else {
#pragma unroll
    for (int i = 0; i < 3; ++i) ptx::cp_async_bulk_tensor_3d_g2s(to + i * panel, &p.q, full, 64 * i, row, head);
  }
}
template <bool kKeys>
__device__ __forceinline__ void load_narrow(const MlaPrefillBackwardParams& p, uint32_t to, uint32_t panel,
                                            uint32_t full, int row, int head) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    ptx::cp_async_bulk_tensor_3d_g2s(to + i * panel, kKeys ? &p.v : &p.grad_out, full, 64 * i, row, head);
  }
}

// Warp 0, one lane.
template <Keep kKeep>
__device__ __forceinline__ void load_tile(const MlaPrefillBackwardParams& p, uint32_t shared, Slot& slot,
                                          uint32_t& kept_parity, const Work& work) {
  constexpr bool kKeys = kKeep == Keep::kKeys;
#pragma unroll 1
  for (int head = work.first_head; head <= work.last_head; ++head) {
    ptx::mbarrier_wait_parity(shared + kKeptEmpty, kept_parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(shared + kKeptFull, kKeptBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = work.row + 64 * half;
      load_wide<kKeys>(p, shared + half * kBoxBytes, kKeptPanel, shared + kKeptFull, row, head);
      load_narrow<kKeys>(p, shared + 3 * kKeptPanel + half * kBoxBytes, kKeptPanel, shared + kKeptFull, row, head);
    }
    kept_parity ^= 1;
#pragma unroll 1
    for (int block = work.begin; block < work.end; ++block) {
      const uint32_t to = shared + kRing + slot.stage * kPassingBytes, full = shared + kFull + 8 * slot.stage;
      const int row = work.passing + block * kPassing;
      ptx::mbarrier_wait_parity(shared + kEmpty + 8 * slot.stage, slot.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, kPassingBytes);
      load_wide<!kKeys>(p, to, kPassingPanel, full, row, head);
      load_narrow<!kKeys>(p, to + 3 * kPassingPanel, kPassingPanel, full, row, head);
      slot.advance();
    }
  }
}

// Warp 1: log-sum-exps and deltas of the queries that pass. One beyond the sequence takes the last one's: it is hidden.
__device__ __forceinline__ void load_stats(const MlaPrefillBackwardParams& p, uint32_t shared, Slot& slot,
                                           const Work& work) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int head = work.first_head; head <= work.last_head; ++head) {
#pragma unroll 1
    for (int block = work.begin; block < work.end; ++block) {
      ptx::mbarrier_wait_parity(shared + kEmpty + 8 * slot.stage, slot.parity ^ 1);
      const uint32_t to = shared + kStats + slot.stage * kStatBytes + 4 * lane;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = work.passing + min(block * kPassing + 32 * half + lane, work.count - 1);
        ptx::cp_async_ca_4(to + 128 * half, p.lse + row * p.heads + head);
        ptx::cp_async_ca_4(to + 4 * kPassing + 128 * half, p.delta + row * p.heads + head);
      }
      __syncwarp();
      ptx::cp_async_mbarrier_arrive_noinc(shared + kFull + 8 * slot.stage);
      slot.advance();
    }
  }
}

__device__ __forceinline__ float2 ld_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

// Starts d = A B^T over kPanels * 64 columns: A the warpgroup's rows of what stays, B what passes.
template <int kPanels>
__device__ __forceinline__ void start_product(uint32_t kept, uint32_t passing, float (&d)[32]) {
  const uint64_t a = ptx::matrix_descriptor(kept, 16, 1024, ptx::Swizzle::k128B);
  const uint64_t b = ptx::matrix_descriptor(passing, 16, 1024, ptx::Swizzle::k128B);
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4 * kPanels; ++i) {  // 16 columns; 32 bytes within a panel
    ptx::wgmma_bf16_ss(d, a + (i / 4 * kKeptPanel + i % 4 * 32) / 16, b + (i / 4 * kPassingPanel + i % 4 * 32) / 16,
                       i != 0);
  }
  ptx::wgmma_commit_group();
  ptx::pin(d);
}

// Starts sum += A B: A in registers, 64 passing rows deep; B lies [rows][columns], so it is MN-major: 16 rows are 2048
// bytes, the next 64 columns a panel.
template <int kCount>
__device__ __forceinline__ void start_sum(const uint32_t (&a)[4][4], uint32_t passing, float (&sum)[kCount]) {
  const uint64_t b = ptx::matrix_descriptor(passing, kPassingPanel, 1024, ptx::Swizzle::k128B);
  ptx::pin(sum);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_bf16_rs<1>(sum, a[i], b + i * (2048 / 16), 1);
  ptx::wgmma_commit_group();
  ptx::pin(sum);
}

// The accumulator's layout is that of A's fragments: 16 columns are 8 elements of every thread.
__device__ __forceinline__ void round(const float (&x)[32], uint32_t (&rounded)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) rounded[i / 4][i % 4] = ptx::cvt_rn_bf16x2_f32(x[2 * i], x[2 * i + 1]);
}

// Which passing rows of a block each of the thread's two rows has to do with: low <= column < high.
struct Seen {
  int low[2], high[2];
};

// Zero where a kept row has nothing to do with a passing one.
__device__ __forceinline__ void hide(const Seen& seen, int first, float (&x)[32]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int low = seen.low[half] - first, high = seen.high[half] - first;
#pragma unroll
    for (int i = 2 * half; i < 32; i += 4) {
      const int column = 8 * (i >> 2);
      if (column < low || column >= high) x[i] = 0.0f;
      if (column + 1 < low || column + 1 >= high) x[i + 1] = 0.0f;
    }
  }
}

// Rows of a stage past the sequence's end belong to others and may hold NaN, which a factor of 0 would not silence: not
// as B of a sum, and not as dP beside a P that is hidden.
__device__ __forceinline__ void zero_tail(uint32_t passing, int rows) {
  const int thread = threadIdx.x - 128;
#pragma unroll 1
  for (int chunk = rows * 8 + thread; chunk < kPassing * 8; chunk += 256) {
#pragma unroll
    for (int panel = 0; panel < 5; ++panel) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(passing + panel * kPassingPanel + 16 * chunk),
                   "r"(0)
                   : "memory");
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(1, 256);
}

// 64 columns of the warp's 16 rows, times `factor`, through its slab; `out` is the first of its rows there.
__device__ __forceinline__ void store_panel(uint32_t slab, const Consumer& me, const float* f, float factor,
                                            uint8_t* out, int64_t row_bytes, int rows) {
  const int in_row = me.lane % 16, out_row = me.lane / 8, chunk = me.lane % 8;
  __syncwarp();  // the slab has been read
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // 16 columns
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = ptx::cvt_rn_bf16x2_f32(f[8 * j + 2 * i] * factor, f[8 * j + 2 * i + 1] * factor);
    }
    ptx::stmatrix_x4(slab + in_row * 128 + (((2 * j + me.lane / 16) ^ (in_row % 8)) << 4), r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = out_row + 4 * i;
    uint4 line;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                 : "r"(slab + row * 128 + ((chunk ^ (row % 8)) << 4))
                 : "memory");
    if (row < rows) *reinterpret_cast<uint4*>(out + row * row_bytes + 16 * chunk) = line;
  }
}

// All blocks of one head: wide += dS (queries or keys that pass), narrow += P (output gradients that pass; _keys).
template <Keep kKeep>
__device__ __forceinline__ void multiply_head(const MlaPrefillBackwardParams& p, uint32_t shared, Slot& slot,
                                              const Consumer& me, const Work& work, int head, float (&wide)[96],
                                              float (&narrow)[64]) {
  constexpr bool kKeys = kKeep == Keep::kKeys;
  const float c = p.scale * kLog2E;
  const uint32_t kept = shared + me.warpgroup * kBoxBytes;
  const int first_row = 64 * me.warpgroup;
  // The rows of all warps between them see passing rows from `low` on and up to `high`: others need no mask.
  const int low = kKeys ? work.offset + first_row + 63 : 0;
  const int high = kKeys ? work.count : min(work.count, work.offset + first_row + 1);
  Seen seen;
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + me.row() + 8 * half;
    seen.low[half] = (kKeys ? work.offset + row : 0) - me.column();
    seen.high[half] = (kKeys ? work.count : min(work.count, work.offset + row + 1)) - me.column();
    if (!kKeys) {
      const int64_t at = static_cast<int64_t>(work.row + min(row, work.left - 1)) * p.heads + head;
      lse[half] = p.lse[at] * kLog2E, delta[half] = p.delta[at];
    }
  }

#pragma unroll 1
  for (int block = work.begin; block < work.end; ++block) {
    const uint32_t passing = shared + kRing + slot.stage * kPassingBytes;
    const uint32_t stats = shared + kStats + slot.stage * kStatBytes + 4 * me.column();
    const int first = block * kPassing;
    const bool masked = first < low || first + kPassing > high;
    ptx::mbarrier_wait_parity(shared + kFull + 8 * slot.stage, slot.parity);
    if (first + kPassing > work.count) zero_tail(passing, work.count - first);

    // S, then P; and dP, then dS. With 160 sums _keys has registers for one of them: P waits in bfloat16, as dV takes
    // it.
    float weights[32], second[32];
    float (&gradients)[32] = kKeys ? weights : second;
    uint32_t rounded[4][4];
    start_product<3>(kept, passing, weights);
    if (!kKeys) start_product<2>(kept + 3 * kKeptPanel, passing + 3 * kPassingPanel, gradients);
    ptx::wgmma_wait_group<kKeys ? 0 : 1>();
    ptx::pin(weights);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {  // 8 columns
      const float2 l = kKeys ? ld_shared_pair(stats + 4 * 2 * i) : make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float minus = kKeys ? (j % 2 ? l.y : l.x) * kLog2E : lse[j / 2];
        weights[i + j] = ptx::ex2_approx_ftz_f32(fmaf(weights[i + j], c, -minus));
      }
    }
    if (masked) hide(seen, first, weights);
    if (kKeys) {
      round(weights, rounded);
      start_product<2>(kept + 3 * kKeptPanel, passing + 3 * kPassingPanel, gradients);
      start_sum(rounded, passing + 3 * kPassingPanel, narrow);
      ptx::wgmma_wait_group<1>();
    } else {
      ptx::wgmma_wait_group<0>();
    }
    ptx::pin(gradients);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float2 d = kKeys ? ld_shared_pair(stats + 4 * kPassing + 4 * 2 * i) : make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair = kKeys ? rounded[i / 8][i % 8 / 2 + j / 2] : 0;
        const float weight = !kKeys ? weights[i + j] : __uint_as_float(j % 2 ? pair & 0xFFFF0000u : pair << 16);
        gradients[i + j] = weight * (gradients[i + j] - (kKeys ? (j % 2 ? d.y : d.x) : delta[j / 2]));
      }
    }
    uint32_t rounded_gradients[4][4];
    round(gradients, rounded_gradients);
    start_sum(rounded_gradients, passing, wide);
    ptx::wgmma_wait_group<0>();
    ptx::pin(wide);
    if (kKeys) ptx::pin(narrow);
    arrive(shared + kEmpty + 8 * slot.stage, me);
    slot.advance();
  }
}

template <Keep kKeep>
__device__ __forceinline__ void multiply_tile(const MlaPrefillBackwardParams& p, uint32_t shared, Slot& slot,
                                              uint32_t& kept_parity, const Consumer& me, const Work& work) {
  constexpr bool kKeys = kKeep == Keep::kKeys;
  const uint32_t slab = shared + kSlabs + (4 * me.warpgroup + me.warp) * kSlabBytes;
  const int first = 64 * me.warpgroup + 16 * me.warp;  // of the warp's rows
  const int rows = work.left - first;
  float wide[96], narrow[64];
#pragma unroll
  for (int i = 64; i < 96; ++i) wide[i] = 0.0f;  // the rotary part, over all heads of the group
#pragma unroll 1
  for (int head = work.first_head; head <= work.last_head; ++head) {
#pragma unroll
    for (int i = 0; i < 64; ++i) wide[i] = narrow[i] = 0.0f;
    if (work.begin < work.end) {
      ptx::mbarrier_wait_parity(shared + kKeptFull, kept_parity);
      kept_parity ^= 1;
      multiply_head<kKeep>(p, shared, slot, me, work, head, wide, narrow);
      arrive(shared + kKeptEmpty, me);
    }

    const int64_t at = static_cast<int64_t>(work.row + first) * p.heads + head;
    if (kKeys) {
      const int64_t row_bytes = static_cast<int64_t>(p.heads) * 256;
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        store_panel(slab, me, wide + 32 * panel, p.scale, static_cast<uint8_t*>(p.grad_k_nope) + at * 256 + 128 * panel,
                    row_bytes, rows);
        store_panel(slab, me, narrow + 32 * panel, 1.0f, static_cast<uint8_t*>(p.grad_v) + at * 256 + 128 * panel,
                    row_bytes, rows);
      }
    } else {
#pragma unroll
      for (int panel = 0; panel < 3; ++panel) {
        store_panel(slab, me, wide + 32 * panel, p.scale, static_cast<uint8_t*>(p.grad_q) + at * 384 + 128 * panel,
                    static_cast<int64_t>(p.heads) * 384, rows);
      }
    }
  }
  if (kKeys) {
    const int group = work.first_head / p.group_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + me.lane / 4 + 8 * half;
      if (row >= work.left) continue;
      float* part = p.rope_parts + (static_cast<int64_t>(group) * p.keys + work.row + row) * 64 + me.column();
#pragma unroll
      for (int i = 2 * half; i < 32; i += 4) {
        *reinterpret_cast<float2*>(part + 8 * (i >> 2)) =
            make_float2(wide[64 + i] * p.scale, wide[64 + i + 1] * p.scale);
      }
    }
  }
}

template <Keep kKeep>
__device__ __forceinline__ void backward(const MlaPrefillBackwardParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + kKeptFull, 1);
    ptx::mbarrier_init(shared + kKeptEmpty, kConsumerWarps);
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(shared + kFull + 8 * s, kKeep == Keep::kKeys ? 1 + 32 : 1);
      ptx::mbarrier_init(shared + kEmpty + 8 * s, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  Slot slot;
  uint32_t kept_parity = 0;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      const bool elected = ptx::elect_sync();
      for_each_tile<kKeep>(p, [&](const Work& work) {
        if (elected && work.begin < work.end) load_tile<kKeep>(p, shared, slot, kept_parity, work);
        __syncwarp();
      });
    } else if (kKeep == Keep::kKeys && warp == 1) {
      for_each_tile<kKeep>(p, [&](const Work& work) { load_stats(p, shared, slot, work); });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer me(warp);
    for_each_tile<kKeep>(p, [&](const Work& work) { multiply_tile<kKeep>(p, shared, slot, kept_parity, me, work); });
  }
}

// Sixteen lanes per row of 128: always the same order.
__device__ __forceinline__ float dot(uint4 x, uint4 y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(a[i] << 16), __uint_as_float(b[i] << 16), sum);
    sum = fmaf(__uint_as_float(a[i] & 0xFFFF0000u), __uint_as_float(b[i] & 0xFFFF0000u), sum);
  }
  return sum;
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kDeltaThreads)
    mla_prefill_backward_delta(const __grid_constant__ dsv3::MlaPrefillDeltaParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (dsv3::kDeltaThreads / 16) + threadIdx.x / 16;
  const int lane = threadIdx.x % 16;
  float sum = 0.0f;
  if (row < p.rows) {
    sum = dsv3::dot(static_cast<const uint4*>(p.out)[row * 16 + lane],
                    static_cast<const uint4*>(p.grad_out)[row * 16 + lane]);
  }
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane == 0 && row < p.rows) p.delta[row] = sum;
}

extern "C" __global__ void __launch_bounds__(dsv3::kRopeSumThreads)
    mla_prefill_backward_rope(const __grid_constant__ dsv3::MlaPrefillRopeParams p) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * dsv3::kRopeSumThreads + threadIdx.x);
  if (i >= p.elements) return;
  float4 sum = *reinterpret_cast<const float4*>(p.parts + i);
  for (int group = 1; group < p.groups; ++group) {
    const float4 part = *reinterpret_cast<const float4*>(p.parts + group * p.elements + i);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  reinterpret_cast<uint2*>(p.grad_k_rope)[i / 4] =
      make_uint2(ptx::cvt_rn_bf16x2_f32(sum.x, sum.y), ptx::cvt_rn_bf16x2_f32(sum.z, sum.w));
}

extern "C" __global__ void __launch_bounds__(dsv3::kBackwardThreads, 1)
    mla_prefill_backward_keys(const __grid_constant__ dsv3::MlaPrefillBackwardParams p) {
  dsv3::backward<dsv3::Keep::kKeys>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kBackwardThreads, 1)
    mla_prefill_backward_queries(const __grid_constant__ dsv3::MlaPrefillBackwardParams p) {
  dsv3::backward<dsv3::Keep::kQueries>(p);
}
