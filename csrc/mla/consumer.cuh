// A thread of a consumer warpgroup of the prefill kernels: the producer is warpgroup 0 of the CTA.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dsv3 {
namespace {

// A consumer thread's place: element i of an accumulator is (row() + 8 * (i >> 1 & 1), 8 * (i >> 2) + column() + (i &
// 1)) of the warpgroup's 64 rows (PTX ISA, wgmma, register fragments of D).
struct Consumer {
  int warpgroup, warp, lane;
  __device__ __forceinline__ explicit Consumer(int warp_of_cta)
      : warpgroup(warp_of_cta / 4 - 1), warp(warp_of_cta % 4), lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int row() const { return 16 * warp + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
};

__device__ __forceinline__ void arrive(uint32_t barrier, const Consumer& me) {
  __syncwarp();
  if (me.lane == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace
}  // namespace dsv3
