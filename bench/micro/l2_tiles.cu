// How fast tiles of 72 KB (64 keys of 576 bfloat16, as mla_decode reads them) come from L2 into shared memory by TMA:
// to each CTA for itself, and to the two of a cluster at once, each of which copies one half to both (docs/bench.md).
//
// Warps      0   its first thread copies, waits and copies again; the others wait for the end
// Barriers   full[s]   tile s has landed: 1 arrival with its 73728 bytes, whoever copied them
//            empty[s]  every CTA of the cluster is done with its tile s: an arrival of each
// Shared     2 tiles of 9 panels of 64 rows x 64 bfloat16, 128-byte swizzle (144 KB), barriers
#include "ptx/cluster.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "span.cuh"

namespace bench {

struct L2TilesParams {
  TensorMap tiles;   // [tiles * 64, 576], boxes of 64 columns and 64 rows, or 32 where two CTAs share the work
  uint32_t* folded;  // [CTAs, 2]: the exclusive or of the words of the last tile in each place
  Span* spans;       // [CTAs]
  uint32_t num_tiles;
  uint32_t turns;  // tiles that a CTA gets, at least 2
};
static_assert(sizeof(L2TilesParams) == 256, "bench/micro/__init__.py");

namespace {

constexpr int kPlaces = 2, kPanels = 9, kThreads = 128;
constexpr uint32_t kPanel = 8192, kTile = kPanels * kPanel, kFull = kPlaces * kTile, kEmpty = kFull + 8 * kPlaces;
static_assert(kEmpty + 8 * kPlaces == 147488, "bench/micro/__init__.py");

template <int kCtas>
__device__ __forceinline__ void copy(const L2TilesParams& p, uint32_t shared, uint32_t turn, uint32_t rank) {
  const uint32_t place = turn % kPlaces, full = shared + kFull + 8 * place;
  const int row = 64 * ((blockIdx.x / kCtas + turn) % p.num_tiles);
  ptx::mbarrier_arrive_expect_tx(full, kTile);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const uint32_t to = shared + place * kTile + panel * kPanel;
    if constexpr (kCtas == 1) {
      ptx::cp_async_bulk_tensor_2d_g2s(to, &p.tiles, full, 64 * panel, row);
    } else {
      ptx::cp_async_bulk_tensor_2d_g2s_multicast(to + rank * kPanel / 2, &p.tiles, full, 64 * panel, row + 32 * rank,
                                                 0b11);
    }
  }
}

template <int kCtas>
__device__ __forceinline__ void run(const L2TilesParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const uint32_t rank = kCtas == 1 ? 0 : ptx::cluster_ctarank();
  if (threadIdx.x == 0) {
    for (int place = 0; place < kPlaces; ++place) {
      ptx::mbarrier_init(shared + kFull + 8 * place, 1);
      ptx::mbarrier_init(shared + kEmpty + 8 * place, kCtas);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if constexpr (kCtas > 1) {
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  }
  if (threadIdx.x == 0) {
    const Stopwatch watch;
#pragma unroll 1
    for (uint32_t turn = 0; turn < kPlaces; ++turn) copy<kCtas>(p, shared, turn, rank);
#pragma unroll 1
    for (uint32_t turn = 0; turn < p.turns; ++turn) {
      const uint32_t place = turn % kPlaces, parity = turn / kPlaces & 1;
      ptx::mbarrier_wait_parity(shared + kFull + 8 * place, parity);
      if (turn + kPlaces >= p.turns) continue;
#pragma unroll
      for (int other = 0; other < kCtas; ++other) {
        ptx::mbarrier_arrive_cluster(ptx::mapa(shared + kEmpty + 8 * place, other));
      }
      ptx::mbarrier_wait_parity(shared + kEmpty + 8 * place, parity);
      copy<kCtas>(p, shared, turn + kPlaces, rank);
    }
    watch.stop(p.spans + blockIdx.x);
  }
  __syncthreads();
#pragma unroll
  for (uint32_t place = 0; place < kPlaces; ++place) {
    const uint32_t last = (p.turns - 1 - place) / kPlaces;  // the last use of this place, counted from its first
    ptx::mbarrier_wait_parity(shared + kFull + 8 * place, last & 1);
    uint32_t folded = 0;
    for (uint32_t i = threadIdx.x; i < kTile / 4; i += kThreads) {
      folded ^= reinterpret_cast<const uint32_t*>(memory + place * kTile)[i];
    }
    for (int step = 16; step > 0; step /= 2) folded ^= __shfl_xor_sync(~0u, folded, step);
    if (threadIdx.x % 32 == 0) atomicXor(p.folded + kPlaces * blockIdx.x + place, folded);
  }
  if constexpr (kCtas > 1) {  // nobody leaves while its barriers may still be arrived at
    __syncwarp();
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 1) l2_tiles_alone(const __grid_constant__ L2TilesParams p) {
  run<1>(p);
}
extern "C" __global__ void __launch_bounds__(128, 1) l2_tiles_pair(const __grid_constant__ L2TilesParams p) {
  run<2>(p);
}

}  // namespace bench
