// What the decode kernels share: 64 rows (query x head) of a request against tiles of 64 keys of its cache.
//
// Shared memory, in panels of 64 rows x 64 bfloat16, 128-byte swizzle (8192 bytes; wgmma's and the tensor maps' form):
//            queries       8 panels         the latent part; the rotary part is in registers, as fragments of A
//            tiles         2 x 9 panels     a ring: keys, whose first 8 panels are the values too
//            weights       2 panels         P of even and odd tiles (decode_loop.cuh only)
//            statistics    4 x 64 float     running maximum of even and odd tiles; sums of even and odd tiles
// Barriers   full[s][h]    half h of stage s has landed: 1 arrival with the bytes (bfloat16), or 4 (FP8: its warps)
//            empty[s][h]   8 arrivals: 4 warps that formed the scores, 4 that multiplied the weights with that half; in
//                          a cluster, of every CTA, because each copies a part of the tile to all
//            Halves: panels 0 to 3, and 4 to 8. Both sides walk the ring with a Slot that lives as long as the CTA.
// Numbers    The bits of a row depend on its own query, keys and cuts alone: a key that it does not see adds nothing to
//            its sums, and a rescaling by 1 is left out because it changes no bit.
#pragma once

#include "mla/mla_decode_params.h"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/ring.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {

constexpr uint32_t kPanel = kDecodePanelBytes;
constexpr uint32_t kTile = kDecodeTileBytes;
constexpr uint32_t kQueries = 0;
constexpr uint32_t kTiles = kQueries + 8 * kPanel;
constexpr uint32_t kWeights = kTiles + kDecodeStages * kTile;
constexpr uint32_t kMaxima = kWeights + 2 * kPanel;
constexpr uint32_t kSums = kMaxima + 2 * 64 * 4;
constexpr uint32_t kFull = kSums + 2 * 64 * 4;
constexpr uint32_t kEmpty = kFull + 2 * 8 * kDecodeStages;
constexpr uint32_t kReady = kEmpty + 2 * 8 * kDecodeStages;
constexpr int kConsumers = 256;
constexpr int kHalves = 2;
constexpr int kLeftPanels = 4;

static_assert(kReady + 2 * 8 == kDecodeSharedBytes, "what the launcher asks for");
static_assert(kDecodeSharedBytes <= 232448, "shared memory of one CTA on sm_90");
static_assert(kTile % 1024 == 0 && kPanel % 1024 == 0, "the swizzle repeats every 1024 bytes: no base offset");
static_assert(kDecodeStages == 2,
              "Slot; and the weights of tile t give way to those of t + 2 without a barrier of their own");

// Named barriers of the consumers; 0 is __syncthreads.
enum NamedBarrier : int { kAllConsumers = 1, kOneWarpgroup = 2 };  // + warpgroup

struct Slot : ptx::RingSlot<kDecodeStages> {
  __device__ __forceinline__ uint32_t tile() const { return kTiles + stage * kTile; }
  __device__ __forceinline__ uint32_t full(int half) const { return kFull + 16 * stage + 8 * half; }
  __device__ __forceinline__ uint32_t empty(int half) const { return kEmpty + 16 * stage + 8 * half; }
};

__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

// First thing in a kernel, by all threads.
template <int kCtas>
__device__ __forceinline__ void initialise_barriers(uint32_t shared, uint32_t full_arrivals) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kHalves * static_cast<int>(kDecodeStages); ++i) {
      ptx::mbarrier_init(shared + kFull + 8 * i, full_arrivals);
      ptx::mbarrier_init(shared + kEmpty + 8 * i, 8 * kCtas);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(shared + kReady + 8 * i, 4);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (kCtas == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  }
}

// Last thing, by the producer: a CTA of a cluster stays until the other one's warps have arrived on its barriers for
// the last time. (The other one's last copies into it are what its own warps wait for.)
template <int kCtas>
__device__ __forceinline__ void drain(uint32_t shared, Slot& slot) {
  if constexpr (kCtas > 1) {
#pragma unroll
    for (int stage = 0; stage < static_cast<int>(kDecodeStages); ++stage) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        ptx::mbarrier_wait_parity(shared + slot.empty(half), slot.parity ^ 1);
      }
      slot.advance();
    }
  }
}

// The plan's item, cut to what the cache holds: a plan that is older than the lengths reads nothing out of bounds.
struct Item {
  int request, first, last;  // keys
  int length;                // of the request
  bool split;                // the request has other items too
  __device__ __forceinline__ int tiles() const { return (last - first + kDecodeKeys - 1) / kDecodeKeys; }
};
__device__ __forceinline__ Item item_at(const MlaDecodeParams& p, int index) {
  const int4 work = __ldg(reinterpret_cast<const int4*>(p.work) + index);
  Item item;
  item.request = work.x;
  item.length = min(max(__ldg(p.lengths + work.x), 0), p.max_keys);
  item.first = min(work.y, item.length);
  item.last = min(work.z, item.length);
  item.split = __ldg(p.splits + work.x + 1) - __ldg(p.splits + work.x) > 1;
  return item;
}

// visit(index, item): this CTA's items in order, the same for every warp.
template <class Visit>
__device__ __forceinline__ void for_each_item(const MlaDecodeParams& p, Visit visit) {
  const int end = __ldg(p.bounds + blockIdx.y + 1);
#pragma unroll 1
  for (int index = __ldg(p.bounds + blockIdx.y); index < end; ++index) visit(index, item_at(p, index));
}

// Producer of a bfloat16 cache: one warp. A box is what a tile has of one page: rows that lie in the page but past the
// length come along (the consumers clear them); pages past the length are neither looked up nor copied. The CTAs of a
// cluster have the same items: each copies every other panel, to both. `row_blocks` of the request have the same keys.
template <int kCtas>
__device__ __forceinline__ void load_tiles(const MlaDecodeParams& p, uint32_t shared, Slot& slot, const Item& item,
                                           unsigned row_blocks) {
  const int lane = threadIdx.x % 32;
  const bool elected = ptx::elect_sync();
  const int rank = static_cast<int>(ptx::cluster_ctarank());
  const int* table = p.table + item.request * p.table_stride;
  const int box_rows = min(1 << p.page_bits, static_cast<int>(kDecodeKeys));
  const int last_entry = (item.last - 1) >> p.page_bits;
  // One CTA reads each key once; where several blocks of rows share them, L2 is to keep them a while.
  const uint64_t policy = row_blocks == 1 ? ptx::kEvictFirst : ptx::kEvictNormal;
  // 32 entries of the table at a time, one per lane, and the next 32 on their way.
  int base = item.first >> p.page_bits;
  const auto entry = [&](int i) { return i <= last_entry ? __ldg(table + i) : 0; };
  int pages = entry(base + lane), ahead = entry(base + 32 + lane);
#pragma unroll 1
  for (int first = item.first; first < item.last; first += kDecodeKeys) {
    const int rows = min(item.last - first, static_cast<int>(kDecodeKeys));
    const int boxes = (rows + box_rows - 1) / box_rows;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int first_panel = half * kLeftPanels, panels = half == 0 ? kLeftPanels : 9 - kLeftPanels;
      const uint32_t full = shared + slot.full(half);
      if (elected) {
        ptx::mbarrier_wait_parity(shared + slot.empty(half), slot.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(panels * boxes * box_rows * 128));
      }
      __syncwarp();
#pragma unroll 1
      for (int box = 0; box < boxes; ++box) {
        const int key = first + box * box_rows;
        int at = (key >> p.page_bits) - base;
        if (half == 0 && at >= 32) {
          base += 32;
          at -= 32;
          pages = ahead;
          ahead = entry(base + 32 + lane);
        }
        const int page = __shfl_sync(~0u, pages, at);
        const int row = key & ((1 << p.page_bits) - 1);
        if (elected) {
          const uint32_t destination = shared + slot.tile() + first_panel * kPanel + box * box_rows * 128;
#pragma unroll 1
          for (int panel = kCtas == 1 ? 0 : rank; panel < panels; panel += kCtas) {
            if constexpr (kCtas == 1) {
              ptx::cp_async_bulk_tensor_3d_g2s_hint(destination + panel * kPanel, &p.cache_map, full,
                                                    (first_panel + panel) * 64, row, page, policy);
            } else {
              ptx::cp_async_bulk_tensor_3d_g2s_multicast(destination + panel * kPanel, &p.cache_map, full,
                                                         (first_panel + panel) * 64, row, page, (1 << kCtas) - 1);
            }
          }
        }
        __syncwarp();
      }
    }
    slot.advance();
  }
}

// A consumer thread's place. Accumulator i of 64 x N is element (row() + 8 * (i >> 1 & 1), 8 * (i >> 2) + column() +
// (i & 1)) (PTX ISA, wgmma, register fragments of D).
struct Consumer {
  int thread, warpgroup, warp, lane;  // 0..255, 0..1, 0..3, 0..31
  __device__ __forceinline__ explicit Consumer(int warp_of_cta)
      : thread(threadIdx.x - 128), warpgroup(warp_of_cta / 4 - 1), warp(warp_of_cta % 4), lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int first_row() const { return 16 * warp; }
  __device__ __forceinline__ int row() const { return first_row() + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
};

__device__ __forceinline__ void st_shared_16(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
__device__ __forceinline__ uint4 ld_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ float ld_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void st_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Offset of 16-byte chunk `chunk` of row `row` in panels of 64 rows: what the 128-byte swizzle makes of it.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return (chunk / 8) * kPanel + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

// Two neighbouring elements of a row, and eight; rows that no vector may touch are read one by one.
__device__ __forceinline__ uint32_t load_2(const uint16_t* source, bool vectors) {
  return vectors ? __ldg(reinterpret_cast<const uint32_t*>(source))
                 : __ldg(source) | static_cast<uint32_t>(__ldg(source + 1)) << 16;
}
__device__ __forceinline__ uint4 load_8(const uint16_t* source, bool vectors) {
  return vectors ? __ldg(reinterpret_cast<const uint4*>(source))
                 : make_uint4(load_2(source, false), load_2(source + 2, false), load_2(source + 4, false),
                              load_2(source + 6, false));
}

// The rows of a request's block of 64 rows.
struct Rows {
  int first, count;
  __device__ __forceinline__ Rows(const MlaDecodeParams& p, unsigned block)
      : first(block * kDecodeRows), count(min(p.rows - first, static_cast<int>(kDecodeRows))) {}
};
__device__ __forceinline__ const uint16_t* query_row(const MlaDecodeParams& p, int request, int row) {
  const int query = row / p.heads, head = row - query * p.heads;
  return p.q + request * p.q_request_stride + query * p.q_query_stride + head * p.q_head_stride;
}

// All consumers: the latent part of the queries into shared memory, rows that do not exist as zeros; the rotary part
// into registers, as fragments of A. Ends with a barrier of the consumers; nobody may still use what was there.
__device__ __forceinline__ void load_queries(const MlaDecodeParams& p, uint32_t shared, const Consumer& me,
                                             const Rows& rows, int request, uint32_t (&rope)[4][4]) {
  constexpr int kChunks = kDecodeLatent / 8, kAtOnce = 4;
  static_assert(kDecodeRows * kChunks % (kConsumers * kAtOnce) == 0, "no tail");
#pragma unroll 1
  for (int i = 0; i < static_cast<int>(kDecodeRows) * kChunks; i += kConsumers * kAtOnce) {
    uint4 value[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = i + j * kConsumers + me.thread, row = at / kChunks;
      value[j] = make_uint4(0, 0, 0, 0);
      if (row < rows.count) value[j] = load_8(query_row(p, request, rows.first + row) + at % kChunks * 8, p.q_vectors);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = i + j * kConsumers + me.thread;
      st_shared_16(shared + kQueries + swizzled(at / kChunks, at % kChunks), value[j]);
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = me.row() + 8 * side;
    const bool exists = row < rows.count;
    const uint16_t* source = query_row(p, request, exists ? rows.first + row : rows.first) + kDecodeLatent;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      rope[k][side] = exists ? load_2(source + 16 * k + me.column(), p.q_vectors) : 0;
      rope[k][side + 2] = exists ? load_2(source + 16 * k + 8 + me.column(), p.q_vectors) : 0;
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(kAllConsumers, kConsumers);
}

// Rows of the tile from `rows` on become zeros: what lies there may be NaN, and 0 * NaN would spoil the output. By
// `threads` threads, of which this is number `thread`; the caller's barrier follows.
__device__ __forceinline__ void clear_rows(uint32_t tile, int rows, int thread, int threads) {
  for (int i = thread; i < (static_cast<int>(kDecodeKeys) - rows) * 72; i += threads) {
    st_shared_16(tile + swizzled(rows + i / 72, i % 72), make_uint4(0, 0, 0, 0));
  }
  ptx::fence_proxy_async_shared();
}

// Starts S = Q K^T on the latent columns of one half of the tile (and the rotary ones, with the right); the caller
// commits.
template <int kHalf>
__device__ __forceinline__ void start_scores(uint32_t shared, const Slot& slot, const uint32_t (&rope)[4][4],
                                             float (&s)[32]) {
  const uint64_t q = ptx::matrix_descriptor(shared + kQueries, 16, 1024, ptx::Swizzle::k128B);
  const uint64_t k = ptx::matrix_descriptor(shared + slot.tile(), 16, 1024, ptx::Swizzle::k128B);
#pragma unroll
  for (int i = 16 * kHalf; i < 16 * kHalf + 16; ++i) {
    const uint64_t step = i / 4 * (kPanel / 16) + 2 * (i % 4);  // 16 columns are 32 bytes
    ptx::wgmma_bf16_ss(s, q + step, k + step, i != 0);
  }
  if (kHalf == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_bf16_rs(s, rope[i], k + 8 * (kPanel / 16) + 2 * i, 1);
  }
}

// The values' half `warpgroup` of a tile: keys along K, so B is MN-major, 64 columns to a panel.
__device__ __forceinline__ uint64_t values(uint32_t shared, const Slot& slot, int warpgroup) {
  return ptx::matrix_descriptor(shared + slot.tile() + warpgroup * kLeftPanels * kPanel, kPanel, 1024,
                                ptx::Swizzle::k128B);
}

// Starts O += P V with P in registers, or as a tile of weights in shared memory; the caller commits.
__device__ __forceinline__ void add_values(const uint32_t (&weights)[4][4], uint64_t values, float (&o)[128]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ptx::wgmma_bf16_rs<1>(o, weights[k], values + k * (16 * 128 / 16), 1);  // 16 keys
}
__device__ __forceinline__ void add_values(uint32_t weights, uint64_t values, float (&o)[128]) {
  const uint64_t a = ptx::matrix_descriptor(weights, 16, 1024, ptx::Swizzle::k128B);
#pragma unroll
  for (int k = 0; k < 4; ++k) ptx::wgmma_bf16_ss<0, 1>(o, a + 2 * k, values + k * (16 * 128 / 16), 1);
}

// What a thread knows of its two rows: the keys they may see end at `limit`; the maximum of the scores so far (raw,
// -inf before the first key), which the output and the sums refer to; its part of the sums.
struct RowState {
  int limit[2];
  float maximum[2];
  float sum[2];
};

__device__ __forceinline__ RowState fresh_rows(const MlaDecodeParams& p, const Consumer& me, const Rows& rows,
                                               const Item& item) {
  RowState state;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int query = (rows.first + me.row() + 8 * side) / p.heads;
    state.limit[side] = min(item.last, p.causal ? item.length - (p.queries - 1 - query) : item.length);
    state.maximum[side] = -INFINITY;
    state.sum[side] = 0.0f;
  }
  return state;
}

// Tiles that end at this key or before are seen whole, by all rows.
__device__ __forceinline__ int unmasked_end(const MlaDecodeParams& p, const Item& item) {
  return min(item.last, p.causal ? item.length - (p.queries - 1) : item.length);
}

// Before the first key the maximum is -inf: 0 takes its place, and exp2(-inf - 0) is 0.
__device__ __forceinline__ float reference(float maximum, float scale) {
  return maximum == -INFINITY ? 0.0f : maximum * scale;
}

// The running maximum becomes `maximum`; returns by how much what refers to the old one shrinks.
__device__ __forceinline__ float raise(float& now, float maximum, float scale) {
  const float factor = ptx::ex2_approx_ftz_f32(reference(now, scale) - reference(maximum, scale));
  now = maximum;
  return factor;
}

// The scores' row maxima, the running ones included; keys from a row's limit on count as -inf. `first` is the tile's
// first key.
__device__ __forceinline__ void row_maxima(const RowState& state, const Consumer& me, int first, bool masked,
                                           float (&s)[32], float (&maximum)[2]) {
  if (masked) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int key = first + 8 * (i >> 2) + me.column() + (i & 1);
      s[i] = key < state.limit[i >> 1 & 1] ? s[i] : -INFINITY;
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float m = state.maximum[side];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if ((i >> 1 & 1) == side) m = fmaxf(m, s[i]);
    }
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    maximum[side] = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
  }
}

// Scores become weights exp2(scale * (s - maximum)), as fragments of A; their sums, not rounded, join the row's.
__device__ __forceinline__ void weights(RowState& state, float scale, float (&s)[32], uint32_t (&fragments)[4][4]) {
  const float shift[2] = {reference(state.maximum[0], scale), reference(state.maximum[1], scale)};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int side = i >> 1 & 1;
    s[i] = ptx::ex2_approx_ftz_f32(fmaf(s[i], scale, -shift[side]));
    state.sum[side] += s[i];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) fragments[k][r] = ptx::cvt_rn_bf16x2_f32(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
  }
}

// Multiplies the output's rows by `factor`, unless that would change no bit in this warp.
__device__ __forceinline__ void rescale(const float (&factor)[2], float (&o)[128]) {
  if (__all_sync(~0u, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= factor[i >> 1 & 1];
}

__device__ __forceinline__ void arrive(uint32_t barrier, const Consumer& me) {
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(barrier);
}

// This warp no longer reads what the barrier guards: known to every CTA that writes there.
template <int kCtas>
__device__ __forceinline__ void release(uint32_t barrier, const Consumer& me) {
  if constexpr (kCtas == 1) {
    arrive(barrier, me);
  } else {
    __syncwarp();
    if (me.lane < kCtas) ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, me.lane));
  }
}

// By what a row's output is divided in the end, and its log-sum-exp in base 2.
__device__ __forceinline__ float inverse_sum(float sum) {
  return sum > 0.0f ? 1.0f / sum : sum;  // 0 without keys, NaN where the sum is
}
__device__ __forceinline__ float log_sum_exp(float maximum, float scale, float sum) {
  return sum == 0.0f ? -INFINITY : fmaf(maximum, scale, log2f(sum));
}
constexpr float kLn2 = 0.693147180559945309f;

// Four neighbouring outputs of a row.
__device__ __forceinline__ void store_four(uint16_t* out, const float4& values, bool vectors) {
  const uint2 value =
      make_uint2(ptx::cvt_rn_bf16x2_f32(values.x, values.y), ptx::cvt_rn_bf16x2_f32(values.z, values.w));
  if (vectors) {
    *reinterpret_cast<uint2*>(out) = value;
  } else {
    const uint32_t parts[2] = {value.x, value.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<uint16_t>(parts[i / 2] >> (16 * (i % 2)));
  }
}

// The output's half of this warpgroup, and the log-sum-exp, from the complete sums of this thread's rows. All scores
// of the item have been formed (by all consumers): the queries' place takes the output's rows on their way.
__device__ __forceinline__ void store_output(const MlaDecodeParams& p, uint32_t shared, const Consumer& me,
                                             const Rows& rows, int index, const Item& item, const float (&maximum)[2],
                                             const float (&sum)[2], float (&o)[128]) {
  float inverse[2], lse[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    inverse[side] = inverse_sum(sum[side]);
    lse[side] = log_sum_exp(maximum[side], p.scale_log2, sum[side]);
  }
  if (item.split) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int row = me.row() + 8 * side;
      if (row >= rows.count) continue;
      const int64_t at = static_cast<int64_t>(index) * p.rows + rows.first + row;
      if (me.warpgroup == 0 && me.lane % 4 == 0) p.partial_lse[at] = lse[side];
      float* out = p.partial_out + at * kDecodeLatent + 256 * me.warpgroup + me.column();
#pragma unroll
      for (int i = 2 * side; i < 128; i += 4) {
        *reinterpret_cast<float2*>(out + 2 * (i - 2 * side)) =
            make_float2(o[i] * inverse[side], o[i + 1] * inverse[side]);
      }
    }
    return;
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = me.row() + 8 * side;
    if (row < rows.count && me.warpgroup == 0 && me.lane % 4 == 0) {
      p.lse[static_cast<int64_t>(item.request) * p.rows + rows.first + row] = lse[side] * kLn2;
    }
  }
  // A warp's 16 rows and 256 columns: through its own four panels' rows, then as whole rows of 512 bytes.
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const uint32_t address =
        shared + kQueries + swizzled(me.first_row() + me.lane % 16, 32 * me.warpgroup + 2 * k + me.lane / 16);
    ptx::stmatrix_x4(address, ptx::cvt_rn_bf16x2_f32(o[8 * k] * inverse[0], o[8 * k + 1] * inverse[0]),
                     ptx::cvt_rn_bf16x2_f32(o[8 * k + 2] * inverse[1], o[8 * k + 3] * inverse[1]),
                     ptx::cvt_rn_bf16x2_f32(o[8 * k + 4] * inverse[0], o[8 * k + 5] * inverse[0]),
                     ptx::cvt_rn_bf16x2_f32(o[8 * k + 6] * inverse[1], o[8 * k + 7] * inverse[1]));
  }
  __syncwarp();
  const int stored = min(rows.count - me.first_row(), 16);
#pragma unroll 1
  for (int i = 0; i < stored; ++i) {
    const uint4 value = ld_shared_16(shared + kQueries + swizzled(me.first_row() + i, 32 * me.warpgroup + me.lane));
    const int row = rows.first + me.first_row() + i, query = row / p.heads, head = row - query * p.heads;
    uint16_t* out = p.out + item.request * p.out_request_stride + query * p.out_query_stride +
                    head * p.out_head_stride + 256 * me.warpgroup + 8 * me.lane;
    if (p.out_vectors) {
      *reinterpret_cast<uint4*>(out) = value;
    } else {
      const uint32_t parts[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = static_cast<uint16_t>(parts[j / 2] >> (16 * (j % 2)));
    }
  }
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

}  // namespace dsv3
