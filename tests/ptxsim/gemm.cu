// A warp-specialised bf16 GEMM for the simulator's tests: D[M, N] = A[M, K] * B[N, K]^T, 128x128 tiles, K in blocks of
// 64, three stages. `bug` plants one mistake at run time, so that one compilation serves every test.
#include <cuda_bf16.h>

#include <cstdint>

struct alignas(128) Map {
  uint64_t opaque[16];
};
struct Params {
  Map a, b, d;
  int tiles_m, tiles_n, blocks_k, bug;
};

enum Bug {
  kNone,
  kNoProxyFence,     // the tile is written with stmatrix and read by the TMA store
  kWrongParity,      // the producer waits for the phase it should run ahead of
  kTooManyBytes,     // expects more than arrive
  kTooFewBytes,      // expects less than arrive
  kEarlyRelease,     // the stage is released before the wgmma that reads it has been waited for
  kWrongSbo,         // stride between groups of eight rows
  kNoWait,           // accumulators are read without wait_group
  kExitBeforeStore,  // the last tile's store is never waited for
  kBarrierCount,     // named barrier with another count
  kNoBarrier,        // no barrier between the warps that write the tile and the one that stores it
  kSwapped,          // LBO and SBO of the descriptors change places
  kNoReleaseWait,    // the next tile overwrites the staging buffer while the store reads it
};

constexpr int kStages = 3, kStageBytes = 2 * 128 * 64 * 2;

__device__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra L; D: }" ::"r"(bar),
      "r"(parity)
      : "memory");
}
__device__ void arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ void load(uint32_t to, const Map* map, uint32_t bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(bar), "r"(x), "r"(y)
      : "memory");
}
__device__ uint64_t descriptor(uint32_t a, uint32_t lbo, uint32_t sbo) {
  return (uint64_t)((a & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)1 << 62;
}

#define R8(d, i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
__device__ void mma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
      "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0; }"
      : R8(d, 0), R8(d, 8), R8(d, 16), R8(d, 24), R8(d, 32), R8(d, 40), R8(d, 48), R8(d, 56)
      : "l"(a), "l"(b), "r"(accumulate));
}
__device__ uint32_t pack(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&v);
}

extern "C" __global__ void __launch_bounds__(384, 1) gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = shared(memory), tile = base + kStages * kStageBytes, full = tile + 128 * 128 * 2,
                 empty = full + 8 * kStages;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2, lane = threadIdx.x & 31, bug = p.bug;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full + 8 * i), "r"(1) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i), "r"(8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int tiles = p.tiles_m * p.tiles_n;
  int s = 0, phase = 0;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      const int bytes = kStageBytes + (bug == kTooManyBytes ? 128 : bug == kTooFewBytes ? -128 : 0);
      for (int t = blockIdx.x; t < tiles; t += gridDim.x)
        for (int k = 0; k < p.blocks_k; ++k) {
          wait(empty + 8 * s, bug == kWrongParity ? phase : phase ^ 1);
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * s), "r"(bytes)
                       : "memory");
          load(base + s * kStageBytes, &p.a, full + 8 * s, k * 64, t % p.tiles_m * 128);
          load(base + s * kStageBytes + kStageBytes / 2, &p.b, full + 8 * s, k * 64, t / p.tiles_m * 128);
          if (++s == kStages) s = 0, phase ^= 1;
        }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int c = group - 1;
    const uint32_t out = tile + c * 64 * 128, lbo = bug == kSwapped ? 1024 : 16,
                   sbo = bug == kWrongSbo  ? 512
                         : bug == kSwapped ? 16
                                           : 1024;
    float d[64];
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      for (int k = 0; k < p.blocks_k; ++k) {
        wait(full + 8 * s, phase);
        const uint64_t a = descriptor(base + s * kStageBytes + c * 64 * 128, lbo, sbo),
                       b = descriptor(base + s * kStageBytes + kStageBytes / 2, lbo, sbo);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(d, a + 2 * j, b + 2 * j, k + j);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (bug == kEarlyRelease && lane == 0) arrive(empty + 8 * s);
        if (bug != kNoWait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (bug != kEarlyRelease && lane == 0) arrive(empty + 8 * s);
        __syncwarp();
        if (++s == kStages) s = 0, phase ^= 1;
      }
      const bool first = (warp & 3) == 0 && lane == 0;
      if (first && bug != kNoReleaseWait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      __syncwarp();
      asm volatile("bar.sync %0, %1;" ::"r"(1 + c), "r"(128) : "memory");
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = 16 * (warp & 3) + (lane & 15), chunk = 2 * (j & 3) + (lane >> 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         out + (j >> 2) * 128 * 128 + row * 128 + ((chunk ^ (row & 7)) << 4)),
                     "r"(pack(d[8 * j], d[8 * j + 1])), "r"(pack(d[8 * j + 2], d[8 * j + 3])),
                     "r"(pack(d[8 * j + 4], d[8 * j + 5])), "r"(pack(d[8 * j + 6], d[8 * j + 7]))
                     : "memory");
      }
      if (bug != kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      if (bug != kNoBarrier)
        asm volatile("bar.sync %0, %1;" ::"r"(1 + c), "r"(bug == kBarrierCount ? 160 : 128) : "memory");
      if (first) {
        for (int h = 0; h < 2; ++h)
          asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&p.d),
                       "r"(out + h * 128 * 128), "r"(t / p.tiles_m * 128 + 64 * h), "r"(t % p.tiles_m * 128 + 64 * c)
                       : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
      __syncwarp();
    }
    if (bug != kExitBeforeStore) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
