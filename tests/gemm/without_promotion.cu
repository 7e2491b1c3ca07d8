// What promotion is for: a product of E4M3 that stays in the tensor cores' accumulator over all of K. Test only.
//
// D [64, 8] = A [64, K] * B [8, K]^T, all contiguous, K a multiple of 128, by one warpgroup. 128-byte swizzle as in
// csrc/gemm/fp8_tile.cuh, copied by hand.
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"

extern "C" __global__ void __launch_bounds__(128, 1)
    without_promotion(const uint4* __restrict__ a, const uint4* __restrict__ b, float* __restrict__ out, int k) {
  __shared__ __align__(1024) uint4 tile[(64 + 8) * 8];
  const uint32_t left = ptx::cvta_to_shared(tile), right = left + 64 * 128;
  float d[4];
  for (int block = 0; block < k / 128; ++block) {
    for (int i = threadIdx.x; i < (64 + 8) * 8; i += 128) {
      const int row = i / 8, chunk = i % 8;
      const uint4* source = row < 64 ? a + row * (k / 16) : b + (row - 64) * (k / 16);
      tile[row * 8 + (chunk ^ (row % 8))] = source[block * 8 + chunk];
    }
    ptx::fence_proxy_async_shared();
    __syncthreads();
    const uint64_t x = ptx::matrix_descriptor(left, 16, 1024, ptx::Swizzle::k128B);
    const uint64_t y = ptx::matrix_descriptor(right, 16, 1024, ptx::Swizzle::k128B);
    ptx::pin(d);
    ptx::wgmma_fence();
    for (int i = 0; i < 4; ++i) ptx::wgmma_e4m3_ss(d, x + 2 * i, y + 2 * i, block + i != 0);
    ptx::wgmma_commit_group();
    ptx::pin(d);
    ptx::wgmma_wait_group<0>();
    ptx::pin(d);
    __syncthreads();
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}
