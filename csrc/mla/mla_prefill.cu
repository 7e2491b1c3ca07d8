// mla_prefill: out = softmax(scale * q k^T) v for packed sequences, 192-wide keys of which the last 64 are shared by
// all heads, 128-wide values; bf16 in and out, float32 inside.
//
// A CTA takes 128 queries of one head of one sequence and walks over their keys, 128 at a time, last ones first: the
// blocks that need a mask come first.
//
// Roles      warp 0        tensor copies of Q, K and V (one elected lane)
//            warps 1..3    leave at once
//            warps 4..11   two consumer warpgroups, 64 queries each
// Barriers   q_full        1 arrival with 49152 bytes
//            q_empty       8 arrivals: a consumer warp's last product with Q is done
//            k_full[2]     1 arrival with 49152 bytes        k_empty[2]   8 arrivals
//            v_full[2]     1 arrival with 32768 bytes        v_empty[2]   8 arrivals
//            named 1, 2    the turn of warpgroup 0, 1: it starts its products while the other one is at its softmax
//            named 3       both warpgroups have zeroed what lies in V past the sequence's end
//            Both sides walk the rings with Slots that live as long as the CTA, across tiles.
// Loop       start S = Q K[j]^T and O += P V[j + 1]; wait for S; softmax of S while O is under way; wait for O; scale
//            it; P = bf16(S). Nothing is in flight over the back edge, which ptxas would serialise (C7514).
// Registers  24 for the producer, 240 for the consumers: S 64, O 64, P 32
// Budget     cycles of a block per SM: tensor 1536 + 1024; shared memory 2304 (wgmma reads 208 KB, copies write 80 KB);
//            exp 1024 (16 a cycle), and about 600 for the rest of the softmax. The tensor cores bound it, as long as
//            one warpgroup's softmax hides behind the other's products. Shared memory: 229456 bytes.
#include "mla/consumer.cuh"
#include "mla/mla_prefill_params.h"
#include "mla/sequences.cuh"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/ring.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dsv3 {
namespace {

constexpr int kRows = 128;  // queries of a CTA
constexpr int kKeys = 128;  // keys of a block
constexpr int kStages = 2;
constexpr int kConsumerWarps = 8;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A panel is 64 columns of 128 rows: 128 bytes a row, as the swizzle wants it.
constexpr uint32_t kPanelBytes = 128 * 128;
constexpr uint32_t kQBytes = 3 * kPanelBytes;
constexpr uint32_t kKBytes = 3 * kPanelBytes;
constexpr uint32_t kVBytes = 2 * kPanelBytes;
constexpr uint32_t kSlabBytes = 16 * 128;  // of one warp's output: 16 rows of 64 columns

constexpr uint32_t kQ = 0;
constexpr uint32_t kK = kQ + kQBytes;
constexpr uint32_t kV = kK + kStages * kKBytes;
constexpr uint32_t kSlabs = kV + kStages * kVBytes;
constexpr uint32_t kQFull = kSlabs + kConsumerWarps * kSlabBytes;
constexpr uint32_t kQEmpty = kQFull + 8;
constexpr uint32_t kKFull = kQEmpty + 8;
constexpr uint32_t kKEmpty = kKFull + 8 * kStages;
constexpr uint32_t kVFull = kKEmpty + 8 * kStages;
constexpr uint32_t kVEmpty = kVFull + 8 * kStages;
constexpr uint32_t kBytes = kVEmpty + 8 * kStages;

static_assert(kBytes == kPrefillSharedBytes, "what the launcher asks for");
static_assert(kBytes <= 232448, "shared memory of one CTA on sm_90");
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg.inc would wait for ever");
static_assert(kPrefillThreads == 128 + 32 * kConsumerWarps, "one warpgroup for the producer, two consumers");

using Slot = ptx::RingSlot<kStages>;

// What a CTA works on.
struct Work {
  int head;
  int q_row, q_left;  // first query's row of the tensor; queries of the sequence from there on
  int k_row, keys;    // first key's row; keys of the sequence
  int sees;           // keys that the first query sees, which may be negative; each next one sees one more (causal)
  int blocks;         // blocks of keys that some query sees
};

// visit(work): this CTA's tiles, in the same order for every warp.
//
// Order of a sequence's tiles: sections of as many heads as keep their keys and values in a part of L2 (512 bytes a key
// and head, 32 MB); within one, the last queries first, which see most keys when causal.
template <class Visit>
__device__ __forceinline__ void for_each_tile(const MlaPrefillParams& p, Visit visit) {
  const Sequences queries{p.cu_q, p.sequences, p.queries}, keys{p.cu_k, p.sequences, p.keys};
  const auto rows_of = [&](int group) { return dsv3::rows_of(queries, group); };
  GroupWalk<kRows> walk;
  GroupTile tile;
  for (int t = blockIdx.x; walk.find(t, p.sequences + 2, p.heads, rows_of, tile); t += gridDim.x) {
    const RowRange own = partners_of(keys, tile.group);
    const int row_tiles = (tile.rows.count + kRows - 1) / kRows;
    const int section_heads = min(p.heads, max(1, 65536 / max(own.count, 1)));
    const int section = tile.tile / (section_heads * row_tiles), within = tile.tile % (section_heads * row_tiles);
    const int heads = min(section_heads, p.heads - section * section_heads);
    Work work;
    work.head = section * section_heads + within % heads;
    const int first = (row_tiles - 1 - within / heads) * kRows;
    work.q_row = tile.rows.begin + first;
    work.q_left = tile.rows.count - first;
    work.k_row = own.begin;
    work.keys = own.count;
    work.sees = p.causal ? own.count - tile.rows.count + first + 1 : own.count;
    const int last = p.causal ? work.sees - 1 + min(kRows, work.q_left) : own.count;
    work.blocks = (max(last, 0) + kKeys - 1) / kKeys;
    visit(work);
  }
}

__device__ __forceinline__ void load_block(const MlaPrefillParams& p, uint32_t shared, Slot& slot, const Work& work,
                                           int block) {
  const uint32_t to = shared + kK + slot.stage * kKBytes, full = shared + kKFull + 8 * slot.stage;
  const int row = work.k_row + block * kKeys;
  ptx::mbarrier_wait_parity(shared + kKEmpty + 8 * slot.stage, slot.parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(full, kKBytes);
  ptx::cp_async_bulk_tensor_3d_g2s(to, &p.k_nope, full, 0, row, work.head);
  ptx::cp_async_bulk_tensor_3d_g2s(to + kPanelBytes, &p.k_nope, full, 64, row, work.head);
  ptx::cp_async_bulk_tensor_2d_g2s(to + 2 * kPanelBytes, &p.k_rope, full, 0, row);
  slot.advance();
}

__device__ __forceinline__ void load_values(const MlaPrefillParams& p, uint32_t shared, Slot& slot, const Work& work,
                                            int block) {
  const uint32_t to = shared + kV + slot.stage * kVBytes, full = shared + kVFull + 8 * slot.stage;
  const int row = work.k_row + block * kKeys;
  ptx::mbarrier_wait_parity(shared + kVEmpty + 8 * slot.stage, slot.parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(full, kVBytes);
  ptx::cp_async_bulk_tensor_3d_g2s(to, &p.v, full, 0, row, work.head);
  ptx::cp_async_bulk_tensor_3d_g2s(to + kPanelBytes, &p.v, full, 64, row, work.head);
  slot.advance();
}

// One lane of warp 0.
__device__ __forceinline__ void load_tile(const MlaPrefillParams& p, uint32_t shared, Slot& k, Slot& v,
                                          uint32_t& q_parity, const Work& work) {
  load_block(p, shared, k, work, work.blocks - 1);
  ptx::mbarrier_wait_parity(shared + kQEmpty, q_parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(shared + kQFull, kQBytes);
#pragma unroll
  for (int panel = 0; panel < 3; ++panel) {
    ptx::cp_async_bulk_tensor_3d_g2s(shared + kQ + panel * kPanelBytes, &p.q, shared + kQFull, 64 * panel, work.q_row,
                                     work.head);
  }
  q_parity ^= 1;
#pragma unroll 1
  for (int block = work.blocks - 1; block > 0; --block) {
    load_block(p, shared, k, work, block - 1);
    load_values(p, shared, v, work, block);
  }
  load_values(p, shared, v, work, 0);
}

// Starts S = Q K^T of the warpgroup's rows and a block.
__device__ __forceinline__ void start_scores(uint32_t shared, uint32_t stage, const Consumer& me, float (&s)[64]) {
  const uint64_t q = ptx::matrix_descriptor(shared + kQ + me.warpgroup * 64 * 128, 16, 1024, ptx::Swizzle::k128B);
  const uint64_t k = ptx::matrix_descriptor(shared + kK + stage * kKBytes, 16, 1024, ptx::Swizzle::k128B);
  ptx::pin(s);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 12; ++i) {  // 16 columns; 32 bytes within a panel
    const uint32_t at = (i / 4 * kPanelBytes + i % 4 * 32) / 16;
    ptx::wgmma_bf16_ss(s, q + at, k + at, i != 0);
  }
  ptx::wgmma_commit_group();
  ptx::pin(s);
}

// Starts O += P V; V lies [keys][columns], so it is MN-major: 16 keys are 2048 bytes, the next 64 columns a panel.
__device__ __forceinline__ void start_outputs(uint32_t shared, uint32_t stage, const uint32_t (&weights)[8][4],
                                              float (&o)[64]) {
  const uint64_t v = ptx::matrix_descriptor(shared + kV + stage * kVBytes, kPanelBytes, 1024, ptx::Swizzle::k128B);
  ptx::pin(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i) ptx::wgmma_bf16_rs<1>(o, weights[i], v + i * (2048 / 16), 1);
  ptx::wgmma_commit_group();
  ptx::pin(o);
}

// Hides the keys of the block that starts at `first` from each row that does not see them.
__device__ __forceinline__ void mask(const MlaPrefillParams& p, const Work& work, const Consumer& me, int first,
                                     float (&s)[64]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 64 * me.warpgroup + me.row() + 8 * half;
    const int sees = p.causal ? min(work.sees + row, work.keys) : work.keys;
    const int left = sees - first - me.column();
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) {
      if (8 * (i >> 2) >= left) s[i] = -INFINITY;
      if (8 * (i >> 2) + 1 >= left) s[i + 1] = -INFINITY;
    }
  }
}

// What a thread knows of its two rows: the largest score so far, and its own part of the sum of exp(score - largest).
struct Rows {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

// Scores become weights, not normalised; `factor` is what older sums are multiplied by. `c` is scale * log2(e).
__device__ __forceinline__ void softmax(float (&s)[64], Rows& rows, float c, float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = rows.top[half];
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float shift = top == -INFINITY ? 0.0f : top * c;  // a row that has seen no key keeps weights 0
    factor[half] = ptx::ex2_approx_ftz_f32(fmaf(rows.top[half], c, -shift));
    rows.top[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) {
      s[i] = ptx::ex2_approx_ftz_f32(fmaf(s[i], c, -shift));
      s[i + 1] = ptx::ex2_approx_ftz_f32(fmaf(s[i + 1], c, -shift));
      sum += s[i] + s[i + 1];
    }
    rows.sum[half] = fmaf(rows.sum[half], factor[half], sum);
  }
}

// The accumulator's layout is that of A's fragments: 16 keys are 8 elements of every thread.
__device__ __forceinline__ void round_weights(const float (&s)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = ptx::cvt_rn_bf16x2_f32(s[2 * i], s[2 * i + 1]);
}

// Rows of V past the sequence's end belong to others and may hold NaN, which a weight of 0 would not silence.
__device__ __forceinline__ void zero_tail(uint32_t shared, uint32_t stage, int keys) {
  const int thread = threadIdx.x - 128;
  for (int chunk = keys * 8 + thread; chunk < 128 * 8; chunk += 256) {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared + kV + stage * kVBytes +
                                                                    panel * kPanelBytes + 16 * chunk),
                   "r"(0)
                   : "memory");
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(3, 256);
}

// Normalised outputs and log-sum-exps of the rows that are there. Through this warp's own slab, 64 columns at a time.
__device__ __forceinline__ void store(const MlaPrefillParams& p, uint32_t shared, const Work& work, const Consumer& me,
                                      Rows& rows, float c, float (&o)[64]) {
  const int first = 64 * me.warpgroup + 16 * me.warp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float norm = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 2 * half; i < 64; i += 4) o[i] *= norm, o[i + 1] *= norm;
    const int row = first + me.lane / 4 + 8 * half;
    if (me.lane % 4 == 0 && row < work.q_left) {
      const float lse = sum == 0.0f ? -INFINITY : fmaf(rows.top[half], c, log2f(sum)) * kLn2;
      p.lse[static_cast<int64_t>(work.q_row + row) * p.heads + work.head] = lse;
    }
  }
  const uint32_t slab = shared + kSlabs + (4 * me.warpgroup + me.warp) * kSlabBytes;
  const int in_row = me.lane % 16, out_row = me.lane / 8, chunk = me.lane % 8;
  uint8_t* out = static_cast<uint8_t*>(p.out) + (static_cast<int64_t>(work.q_row + first) * p.heads + work.head) * 256 +
                 16 * chunk;
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
    __syncwarp();  // the slab has been read
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 16 columns
      const float* f = o + 32 * panel + 8 * j;
      ptx::stmatrix_x4(slab + in_row * 128 + (((2 * j + me.lane / 16) ^ (in_row % 8)) << 4),
                       ptx::cvt_rn_bf16x2_f32(f[0], f[1]), ptx::cvt_rn_bf16x2_f32(f[2], f[3]),
                       ptx::cvt_rn_bf16x2_f32(f[4], f[5]), ptx::cvt_rn_bf16x2_f32(f[6], f[7]));
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
      if (first + row < work.q_left) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * p.heads * 256 + 128 * panel) = line;
      }
    }
  }
}

__device__ __forceinline__ void attend(const MlaPrefillParams& p, uint32_t shared, Slot& k, Slot& v, uint32_t& q_parity,
                                       const Consumer& me, const Work& work) {
  const float c = p.scale * kLog2E;
  Rows rows;
  float o[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) o[i] = 0.0f;
  if (work.blocks > 0) {
    float s[64], factor[2];
    uint32_t weights[8][4];
    // Keys from here on are hidden from the warpgroup's first row, if from any.
    const int seen = p.causal ? min(work.sees + 64 * me.warpgroup, work.keys) : work.keys;
    int block = work.blocks - 1;

    ptx::mbarrier_wait_parity(shared + kQFull, q_parity);
    q_parity ^= 1;
    ptx::mbarrier_wait_parity(shared + kKFull + 8 * k.stage, k.parity);
    start_scores(shared, k.stage, me, s);
    ptx::wgmma_wait_group<0>();
    ptx::pin(s);
    arrive(shared + kKEmpty + 8 * k.stage, me);
    k.advance();
    if ((block + 1) * kKeys > seen) mask(p, work, me, block * kKeys, s);
    softmax(s, rows, c, factor);
    round_weights(s, weights);
    if ((block + 1) * kKeys > work.keys) {
      ptx::mbarrier_wait_parity(shared + kVFull + 8 * v.stage, v.parity);
      zero_tail(shared, v.stage, work.keys - block * kKeys);
    }

#pragma unroll 1
    for (; block > 0; --block) {
      ptx::mbarrier_wait_parity(shared + kKFull + 8 * k.stage, k.parity);
      ptx::bar_sync(1 + me.warpgroup, 256);
      start_scores(shared, k.stage, me, s);
      ptx::mbarrier_wait_parity(shared + kVFull + 8 * v.stage, v.parity);
      start_outputs(shared, v.stage, weights, o);
      ptx::bar_arrive(2 - me.warpgroup, 256);
      ptx::wgmma_wait_group<1>();
      ptx::pin(s);
      arrive(shared + kKEmpty + 8 * k.stage, me);
      k.advance();
      if (block * kKeys > seen) mask(p, work, me, (block - 1) * kKeys, s);
      softmax(s, rows, c, factor);
      ptx::wgmma_wait_group<0>();
      ptx::pin(o);
      arrive(shared + kVEmpty + 8 * v.stage, me);
      v.advance();
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= factor[i >> 1 & 1];
      round_weights(s, weights);
    }
    arrive(shared + kQEmpty, me);
    ptx::mbarrier_wait_parity(shared + kVFull + 8 * v.stage, v.parity);
    start_outputs(shared, v.stage, weights, o);
    ptx::wgmma_wait_group<0>();
    ptx::pin(o);
    arrive(shared + kVEmpty + 8 * v.stage, me);
    v.advance();
  }
  store(p, shared, work, me, rows, c, o);
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kPrefillThreads, 1)
    mla_prefill_128x128(const __grid_constant__ dsv3::MlaPrefillParams p) {
  using namespace dsv3;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + kQFull, 1);
    ptx::mbarrier_init(shared + kQEmpty, kConsumerWarps);
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(shared + kKFull + 8 * s, 1);
      ptx::mbarrier_init(shared + kKEmpty + 8 * s, kConsumerWarps);
      ptx::mbarrier_init(shared + kVFull + 8 * s, 1);
      ptx::mbarrier_init(shared + kVEmpty + 8 * s, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  Slot k, v;
  uint32_t q_parity = 0;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      const bool elected = ptx::elect_sync();
      for_each_tile(p, [&](const Work& work) {
        if (elected && work.blocks > 0) load_tile(p, shared, k, v, q_parity, work);
        __syncwarp();
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer me(warp);
    if (me.warpgroup == 1) ptx::bar_arrive(1, 256);  // warpgroup 0 has the first turn
    for_each_tile(p, [&](const Work& work) { attend(p, shared, k, v, q_parity, me, work); });
    if (me.warpgroup == 0) ptx::bar_sync(1, 256);  // takes the last turn that it was given
  }
}
