// What m64n64k16 (bfloat16) costs with A in shared memory and with A in registers, while TMA fills the operands and
// while nothing does (docs/bench.md). At full rate one takes 32 cycles and, from shared memory, reads 2 KB of A and 2
// KB of B: 128 bytes a cycle, all that shared memory gives, before a single byte is written there.
//
// Warps      0-7   two warpgroups, the same rows of A each: D[64, 64] += A * panel^T, panel by panel
//            8     its first thread fills the ring with panels, in order, or once where nothing is filled
// Barriers   full[s]   panel s has landed: 1 arrival with 8192 bytes
//            empty[s]  8 arrivals, a lane of each consuming warp
//            ready     A has landed: 1 arrival with 8192 bytes
// Shared     A (8 KB), a ring of 8 panels of 64 rows x 64 bfloat16, 128-byte swizzle (64 KB), barriers
// A turn of the loop takes the ring once, eight panels of four wgmmas, and ends with nothing in flight (C7514).
#include "ptx/convert.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "span.cuh"

namespace bench {

struct WgmmaOperandsParams {
  TensorMap a;       // [64, 64], box of all of it
  TensorMap panels;  // [8 * 64, 64], boxes of 64 rows
  float* d;          // [2 warpgroups, 128 threads, 32 accumulators], of CTA 0
  Span* spans;       // [CTAs]
  uint32_t turns;
};
static_assert(sizeof(WgmmaOperandsParams) == 384, "bench/micro/__init__.py");

namespace {

constexpr int kPanels = 8, kConsumers = 256;
constexpr uint32_t kPanel = 8192, kRing = kPanel, kFull = kRing + kPanels * kPanel, kEmpty = kFull + 8 * kPanels;
constexpr uint32_t kReady = kEmpty + 8 * kPanels;
static_assert(kReady + 8 == 73864, "bench/micro/__init__.py");

__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return ptx::matrix_descriptor(address, 16, 1024, ptx::Swizzle::k128B);
}

template <bool kRegisters, bool kFill>
__device__ __forceinline__ void consume(const WgmmaOperandsParams& p, uint32_t shared, float (&d)[32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  uint32_t a[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = 16 * warp + lane % 16, chunk = 2 * k + lane / 16;
    if constexpr (kRegisters) ptx::ldmatrix_x4(a[k], shared + row * 128 + ((chunk ^ row % 8) << 4));
  }
  const uint64_t a_descriptor = descriptor(shared), ring = descriptor(shared + kRing);
#pragma unroll 1
  for (uint32_t turn = 0; turn < p.turns; ++turn) {
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kPanels; ++s) {
      if (kFill || turn == 0) ptx::mbarrier_wait_parity(shared + kFull + 8 * s, kFill ? turn & 1 : 0);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t b = ring + s * kPanel / 16 + 2 * k;
        if constexpr (kRegisters) {
          ptx::wgmma_bf16_rs(d, a[k], b, 1);
        } else {
          ptx::wgmma_bf16_ss(d, a_descriptor + 2 * k, b, 1);
        }
      }
      ptx::wgmma_commit_group();
      if (kFill && s > 0) {
        ptx::wgmma_wait_group<1>();
        if (lane == 0) ptx::mbarrier_arrive(shared + kEmpty + 8 * (s - 1));
      }
    }
    ptx::pin(d);
    ptx::wgmma_wait_group<0>();
    if (kFill && lane == 0) ptx::mbarrier_arrive(shared + kEmpty + 8 * (kPanels - 1));
  }
}

template <bool kFill>
__device__ __forceinline__ void fill(const WgmmaOperandsParams& p, uint32_t shared) {
  const uint32_t turns = kFill ? p.turns : 1;
#pragma unroll 1
  for (uint32_t i = 0; i < turns * kPanels; ++i) {
    const uint32_t s = i % kPanels, full = shared + kFull + 8 * s;
    ptx::mbarrier_wait_parity(shared + kEmpty + 8 * s, (i / kPanels & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, kPanel);
    ptx::cp_async_bulk_tensor_2d_g2s(shared + kRing + s * kPanel, &p.panels, full, 0, 64 * s);
  }
}

template <bool kRegisters, bool kFill>
__device__ __forceinline__ void run(const WgmmaOperandsParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kPanels; ++s) {
      ptx::mbarrier_init(shared + kFull + 8 * s, 1);
      ptx::mbarrier_init(shared + kEmpty + 8 * s, kConsumers / 32);
    }
    ptx::mbarrier_init(shared + kReady, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(shared + kReady, kPanel);
    ptx::cp_async_bulk_tensor_2d_g2s(shared, &p.a, shared + kReady, 0, 0);
  }
  __syncthreads();
  ptx::mbarrier_wait_parity(shared + kReady, 0);
  const Stopwatch watch;
  // The same for a whole warp, as the compiler can see: wgmma in a divergent branch is serialised (C7519).
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (warp == kConsumers / 32) {
    if (threadIdx.x == kConsumers) fill<kFill>(p, shared);
    return;
  }
  float d[32] = {};
  consume<kRegisters, kFill>(p, shared, d);
  if (threadIdx.x == 0) watch.stop(p.spans + blockIdx.x);
  if (blockIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p.d[32 * threadIdx.x + i] = d[i];
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(288, 1) wgmma_ss_idle(const __grid_constant__ WgmmaOperandsParams p) {
  run<false, false>(p);
}
extern "C" __global__ void __launch_bounds__(288, 1) wgmma_rs_idle(const __grid_constant__ WgmmaOperandsParams p) {
  run<true, false>(p);
}
extern "C" __global__ void __launch_bounds__(288, 1) wgmma_ss_fill(const __grid_constant__ WgmmaOperandsParams p) {
  run<false, true>(p);
}
extern "C" __global__ void __launch_bounds__(288, 1) wgmma_rs_fill(const __grid_constant__ WgmmaOperandsParams p) {
  run<true, true>(p);
}

}  // namespace bench
