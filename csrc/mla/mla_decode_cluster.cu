// mla_decode of few requests: a cluster shares out the keys of each and joins what its CTAs have through their shared
// memory. One launch: no plan, no workspace, no second kernel (docs/mla.md).
//
// A cluster of 2, 4 or 8 CTAs takes 64 rows of a request; its ranks take the request's tiles in order, and walk over
// them as in mla_decode.cu (mla/decode_loop.cuh). Then, with 512 / ranks columns of the output owned by each rank:
//   1. own tiles done, sums of both warpgroups there: nobody in this CTA reads its ring any more
//   2. every other rank is told so, and the log-sum-exps of the 64 rows
//   3. all others' are here: the weights of the ranks follow, the same in all; the output times this rank's weight goes
//      into the owners' rings, row by row of 64 columns
//   4. all parts of the own columns are here: they are added in the order of rank and stored
//
// Roles      mla/decode_loop.cuh
// Barriers   full, empty, ready, named: mla/decode_tile.cuh, mla/decode_loop.cuh
//            cluster       all threads arrive when the CTA's barriers are initialised; consumers wait before they send
//            others        an arrival of this CTA; from each other rank one, which says that its ring is free, and 256
//                          bytes: log-sum-exps
//            parts         1 arrival and (ranks with keys) x rows x (512 / ranks) x 4 bytes: this rank's columns
//            A rank sends nothing else and waits for all that it is sent: none ends while another may write to it.
// Budget     of the join, with R rows and 8 ranks: a CTA sends 1792 bytes, and 2048 R of which it keeps an eighth, adds
//            2048 R, and stores 128 R. Registers: the loop's.
#include "mla/decode_loop.cuh"

namespace dsv3 {
namespace {

constexpr int kMaxRanks = kDecodeMaxCluster;
constexpr uint32_t kLseBytes = kDecodeRows * 4;
constexpr uint32_t kLses = kDecodeSharedBytes;  // of the other ranks, in their order
constexpr uint32_t kOthers = kLses + (kMaxRanks - 1) * kLseBytes;
constexpr uint32_t kParts = kOthers + 8;
static_assert(kParts + 8 == kDecodeClusterSharedBytes, "what the launcher asks for");
static_assert(kDecodeClusterSharedBytes <= 232448, "shared memory of one CTA on sm_90");
static_assert(kLses % 16 == 0, "behind barriers of 8 bytes");

// Parts come in blocks of 64 rows and 64 columns, 256 bytes to a row: rank by rank, each with what its ranks own.
constexpr int kBlockColumns = 64;
constexpr int kBlocks = kDecodeLatent / kBlockColumns;
constexpr uint32_t kBlockBytes = kDecodeRows * kBlockColumns * 4;
static_assert(kMaxRanks <= kBlocks && kBlocks * kBlockBytes <= kDecodeStages * kTile, "all parts fit the ring");
static_assert(kBlocks == 8, "four to a warpgroup");

// Where a block keeps 16-byte chunk `chunk` of a row. Eight neighbouring lanes write two chunks of rows r, r + 8, r + 1
// and r + 9, or read eight chunks of a row: both meet eight different banks of 16 bytes.
constexpr uint32_t place_of(int row, int chunk) {
  return row * (kBlockColumns * 4) + ((chunk ^ (row & 1) << 1 ^ (row & 8) >> 1) << 4);
}
constexpr bool meets_all_banks(int row, int chunk) {
  uint32_t banks = 0;
  for (int lane = 0; lane < 8; ++lane) {
    banks |= 1u << place_of(row + lane / 4 + lane % 2 * 8, chunk + lane % 4 / 2) / 16 % 8;
  }
  return banks == 0xFF;
}
static_assert(meets_all_banks(0, 0) && meets_all_banks(2, 6) && meets_all_banks(20, 8), "lanes of send()");

// The cluster, and the tiles that this CTA has of the request: ranks take them in order, the first ones one more where
// they do not divide. `busy` ranks have any.
struct Share {
  int rank, ranks, busy;
  int block_bits;  // log2 of the blocks of columns that each rank owns
  Item item;
  __device__ __forceinline__ Share(const MlaDecodeParams& p, int request)
      : rank(ptx::cluster_ctarank()), ranks(ptx::cluster_nctarank()), block_bits(__clz(ranks) - __clz(kBlocks)) {
    item.request = request;
    item.length = min(max(__ldg(p.lengths + request), 0), p.max_keys);
    item.split = true;
    constexpr int kKeys = kDecodeKeys;
    const int tiles = (item.length + kKeys - 1) / kKeys, each = tiles >> (31 - __clz(ranks)),
              more = tiles & (ranks - 1);
    const int first = rank * each + min(rank, more);
    item.first = min(first * kKeys, item.length);
    item.last = min((first + each + (rank < more ? 1 : 0)) * kKeys, item.length);
    busy = min(tiles, ranks);
  }
  // Where in a ring the parts that `from` sends begin.
  __device__ __forceinline__ uint32_t parts_of(int from) const { return kTiles + (from << block_bits) * kBlockBytes; }
};

// A warpgroup's tiles all lie in one stage here, as a CTA has one item; where ptxas 13.5 knows that, it keeps the
// descriptors of a whole tile through the loop and spills.
struct OpaqueSlot : Slot {
  __device__ __forceinline__ void advance() {
    Slot::advance();
    asm volatile("" : "+r"(stage));
  }
};

// The ranks' log-sum-exps (base 2) of this thread's rows: told to all, by all, and what follows from them.
struct Weights {
  float mine[2];  // by which this rank's part enters
  float lse[2];   // of the row, base 2
};
__device__ __forceinline__ Weights exchange(uint32_t shared, const Consumer& me, const Share& share,
                                            const float (&lse)[2]) {
  // Warp w tells rank w that this ring is free, as a stage is given back to a CTA that copies into it.
  const int warp = me.thread / 32;
  if (me.lane == 0 && warp < share.ranks && warp != share.rank) {
    ptx::mbarrier_arrive_cluster(ptx::mapa(shared + kOthers, warp));
  }
  // Of the four lanes that share rows, each tells one rank, and with the second warpgroup one of the other four.
  const int peer = 4 * me.warpgroup + me.lane % 4;
  if (peer < share.ranks && peer != share.rank) {
    const uint32_t slot = kLses + (share.rank - (share.rank > peer)) * kLseBytes + 4 * me.row();
    const uint32_t there = ptx::mapa(shared + slot, peer), barrier = ptx::mapa(shared + kOthers, peer);
#pragma unroll
    for (int side = 0; side < 2; ++side) ptx::st_async(there + 32 * side, __float_as_uint(lse[side]), barrier);
  }
  ptx::mbarrier_wait_parity_cluster(shared + kOthers, 0);

  // All at once, ranks that there are not as some other and then as -inf: no load waits for another.
  float all[kMaxRanks][2];
#pragma unroll
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    const int other = min(rank - (rank > share.rank), share.ranks - 2);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float told = ld_shared(shared + kLses + other * kLseBytes + 4 * (me.row() + 8 * side));
      all[rank][side] = rank == share.rank ? lse[side] : rank < share.ranks ? told : -INFINITY;
    }
  }
  Weights weights;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) top = fmaxf(top, all[rank][side]);
    const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) total += ptx::ex2_approx_ftz_f32(all[rank][side] - shift);
    weights.mine[side] = total == 0.0f ? 0.0f : ptx::ex2_approx_ftz_f32(lse[side] - shift) / total;
    weights.lse[side] = total == 0.0f ? -INFINITY : shift + log2f(total);
  }
  return weights;
}

// The rows that exist, times `factor`, to the owners of their columns.
__device__ __forceinline__ void send(uint32_t shared, const Consumer& me, const Share& share, const Rows& rows,
                                     const float (&factor)[2], const float (&o)[128]) {
  if (me.first_row() >= rows.count) return;
  // Of two neighbouring lanes, which have two columns each of the same two rows, the even one takes four columns of the
  // first row and the odd one of the second.
  const bool odd = me.lane % 2 == 1;
  const int row = me.row() + (odd ? 8 : 0);
  const bool exists = row < rows.count;
  const uint32_t barrier = shared + kParts;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int block = 4 * me.warpgroup + quarter, owner = block >> share.block_bits;
    const int within = block - (owner << share.block_bits);
    const uint32_t panel = shared + share.parts_of(share.rank) + within * kBlockBytes;
    const uint32_t there = ptx::mapa(panel, owner), there_barrier = ptx::mapa(barrier, owner);
#pragma unroll
    for (int j = 0; j < kBlockColumns / 8; ++j) {
      const float* part = o + 32 * quarter + 4 * j;
      const float first[2] = {part[0] * factor[0], part[1] * factor[0]};
      const float second[2] = {part[2] * factor[1], part[3] * factor[1]};
      const float x = __shfl_xor_sync(~0u, odd ? first[0] : second[0], 1);
      const float y = __shfl_xor_sync(~0u, odd ? first[1] : second[1], 1);
      if (!exists) continue;
      ptx::st_async_v4(there + place_of(row, 2 * j + me.lane % 4 / 2), odd ? x : first[0], odd ? y : first[1],
                       odd ? second[0] : x, odd ? second[1] : y, there_barrier);
    }
  }
}

// This rank's columns: the parts' sum, in the order of rank.
__device__ __forceinline__ void store_sum(const MlaDecodeParams& p, uint32_t shared, const Consumer& me,
                                          const Share& share, const Rows& rows) {
  if (share.busy > 0) ptx::mbarrier_wait_parity_cluster(shared + kParts, 0);
  constexpr int kChunkBits = 4;
  static_assert(kBlockColumns / 4 == 1 << kChunkBits, "16-byte chunks of a block's row");
  const int bits = kChunkBits + share.block_bits;  // chunks of a row that this rank owns
#pragma unroll 1
  for (int i = me.thread; i < rows.count << bits; i += kConsumers) {
    const int row_of_block = i >> bits, chunk = i & ((1 << bits) - 1);
    const uint32_t place =
        shared + (chunk >> kChunkBits) * kBlockBytes + place_of(row_of_block, chunk & ((1 << kChunkBits) - 1));
    uint4 parts[kMaxRanks];  // all at once, as above
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) {
      parts[rank] = rank < share.busy ? ld_shared_16(place + share.parts_of(rank)) : make_uint4(0, 0, 0, 0);
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (const uint4& part : parts) {
      sum.x += __uint_as_float(part.x), sum.y += __uint_as_float(part.y);
      sum.z += __uint_as_float(part.z), sum.w += __uint_as_float(part.w);
    }
    const int row = rows.first + row_of_block, query = row / p.heads, head = row - query * p.heads;
    store_four(p.out + share.item.request * p.out_request_stride + query * p.out_query_stride +
                   head * p.out_head_stride + 4 * ((share.rank << bits) + chunk),
               sum, p.out_vectors);
  }
}

template <class Cache>
__device__ __forceinline__ void consume(const MlaDecodeParams& p, uint32_t shared, const Consumer& me) {
  const Share share(p, blockIdx.z);
  const Rows rows(p, blockIdx.y);
  if (me.thread == 0 && share.busy > 0) {
    ptx::mbarrier_arrive_expect_tx(shared + kParts, share.busy * rows.count * (kBlockColumns * 4 << share.block_bits));
  }
  uint32_t rope[4][4];
  load_queries(p, shared, me, rows, share.item.request, rope);
  RowState state = fresh_rows(p, me, rows, share.item);
  uint32_t phase = 0;
  float o[128], sum[2], lse[2], factor[2];
  walk<Cache>(p, shared, me, share.item, rope, OpaqueSlot(), phase, state, o);
  add_sums(shared, me, state, sum);
#pragma unroll
  for (int side = 0; side < 2; ++side) lse[side] = log_sum_exp(state.maximum[side], p.scale_log2, sum[side]);
  ptx::barrier_cluster_wait();  // all ranks run, and have barriers
  const Weights weights = exchange(shared, me, share, lse);
#pragma unroll
  for (int side = 0; side < 2; ++side) factor[side] = weights.mine[side] * inverse_sum(sum[side]);
  if (share.rank < share.busy) send(shared, me, share, rows, factor, o);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = me.row() + 8 * side;
    if (share.rank == 0 && me.warpgroup == 0 && me.lane % 4 == 0 && row < rows.count) {
      p.lse[static_cast<int64_t>(share.item.request) * p.rows + rows.first + row] = weights.lse[side] * kLn2;
    }
  }
  store_sum(p, shared, me, share, rows);
}

template <class Cache>
__device__ __forceinline__ void run(const MlaDecodeParams& p) {
  static_assert(fits<Cache>(), "setmaxnreg.inc would wait for ever");
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    if (Cache::kClears && p.max_keys > 0) ptx::prefetch_tensormap(&p.cache_map);  // a cache that is copied
    ptx::mbarrier_init(shared + kOthers, ptx::cluster_nctarank());
    ptx::mbarrier_init(shared + kParts, 1);
  }
  initialise_barriers<1>(shared, Cache::kFullArrivals);
  ptx::barrier_cluster_arrive_relaxed();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(shared + kOthers, (ptx::cluster_nctarank() - 1) * kLseBytes);
  ptx::griddepcontrol_wait();
  if (warp < 4) {
    ptx::setmaxnreg_dec<Cache::kProducerRegisters>();
    Slot slot;
    if (warp < Cache::kProducers) {
      Cache::load(p, shared, slot, warp, Share(p, blockIdx.z).item, gridDim.y);
    }
  } else {
    ptx::setmaxnreg_inc<Cache::kConsumerRegisters>();
    consume<Cache>(p, shared, Consumer(warp));
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_bf16_cluster(const __grid_constant__ dsv3::MlaDecodeParams p) {
  dsv3::run<dsv3::Bf16Cache<1>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kDecodeThreads, 1)
    mla_decode_fp8_cluster(const __grid_constant__ dsv3::MlaDecodeParams p) {
  dsv3::run<dsv3::Fp8Cache<56, 224>>(p);
}
