// Kernels whose PTX comes from the toolkit's own headers: cuda::barrier, cuda::pipeline, memcpy_async, cooperative
// groups with clusters, warp intrinsics.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

#include <cuda/barrier>
#include <cuda/pipeline>

namespace cg = cooperative_groups;

// Two shared buffers filled ahead of their use; out[i] = 2 * in[i] + 1.
extern "C" __global__ void barrier_copy(const int* in, int* out, int tiles) {
  __shared__ alignas(16) int buffer[2][128];
  __shared__ cuda::barrier<cuda::thread_scope_block> bar[2];
  auto block = cg::this_thread_block();
  if (block.thread_rank() < 2) init(&bar[block.thread_rank()], block.size());
  block.sync();
  cuda::memcpy_async(block, buffer[0], in, sizeof(int) * 128, bar[0]);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles)
      cuda::memcpy_async(block, buffer[(t + 1) & 1], in + 128 * (t + 1), sizeof(int) * 128, bar[(t + 1) & 1]);
    bar[t & 1].arrive_and_wait();
    out[128 * t + threadIdx.x] = 2 * buffer[t & 1][threadIdx.x] + 1;
    block.sync();
  }
}

// `careless` leaves two groups in flight at the end too, where no later ones follow them.
extern "C" __global__ void pipeline_copy(const float* in, float* out, int tiles, int careless) {
  __shared__ alignas(16) float buffer[3][256];
  auto block = cg::this_thread_block();
  cuda::pipeline<cuda::thread_scope_thread> pipe = cuda::make_pipeline();
  int next = 0;
  for (int t = 0; t < tiles; ++t) {
    for (; next < tiles && next < t + 3; ++next) {
      pipe.producer_acquire();
      cuda::memcpy_async(&buffer[next % 3][2 * threadIdx.x], &in[256 * next + 2 * threadIdx.x],
                         cuda::aligned_size_t<8>(8), pipe);
      pipe.producer_commit();
    }
    if (careless || t + 2 < tiles)
      cuda::pipeline_consumer_wait_prior<2>(pipe);
    else
      cuda::pipeline_consumer_wait_prior<0>(pipe);
    block.sync();
    out[128 * t + threadIdx.x] = buffer[t % 3][threadIdx.x] + buffer[t % 3][255 - threadIdx.x];
    pipe.consumer_release();
    block.sync();
  }
}

// Every CTA of the cluster writes into its right neighbour's shared memory, then all reduce over the cluster.
extern "C" __global__ void __cluster_dims__(4, 1, 1) cluster_sum(const int* in, int* neighbour, int* total) {
  __shared__ int value[64], sum;
  auto cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), n = cluster.num_blocks();
  if (threadIdx.x == 0) sum = 0;
  cluster.sync();
  cluster.map_shared_rank(value, (rank + 1) % n)[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  atomicAdd(cluster.map_shared_rank(&sum, 0), in[blockIdx.x * 64 + threadIdx.x]);
  cluster.sync();
  neighbour[blockIdx.x * 64 + threadIdx.x] = value[threadIdx.x];
  if (threadIdx.x == 0) total[blockIdx.x] = *cluster.map_shared_rank(&sum, 0);
  cluster.sync();
}

extern "C" __global__ void warp_tools(const int* in, int* out) {
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  auto small = cg::tiled_partition<8>(warp);
  const int v = in[threadIdx.x];
  out[threadIdx.x] = cg::reduce(warp, v, cg::plus<int>());
  out[128 + threadIdx.x] = cg::exclusive_scan(small, v);
  out[256 + threadIdx.x] = __popc(__match_any_sync(~0u, v & 3)) + (__ballot_sync(~0u, v > 0) >> 31);
  int odd = 0;
  if (v & 1) {
    auto active = cg::coalesced_threads();
    odd = active.thread_rank() + 100 * active.size();
  }
  out[384 + threadIdx.x] = odd;
  double d = 0;
  for (int i = 0; i <= (int)threadIdx.x; ++i) d += 1.0 / (1 + in[i] * in[i]);
  out[512 + threadIdx.x] = (int)(1e6 * d) + __float2int_rn(1000 * sinf(v) + 10 * expf(v * 1e-3f));
}

__device__ __noinline__ unsigned gcd(unsigned a, unsigned b) {
  while (b) {
    unsigned t = a % b;
    a = b;
    b = t;
  }
  return a;
}
extern "C" __global__ void calls(const unsigned* in, unsigned* out) {
  unsigned local[8];
  for (int i = 0; i < 8; ++i) local[(in[threadIdx.x] + i) & 7] = gcd(in[threadIdx.x] + 1, in[threadIdx.x ^ i] + 1);
  unsigned s = 0;
  for (int i = 0; i < 8; ++i) s = s * 31 + local[(i * 5 + in[0]) & 7];
  switch (in[threadIdx.x] % 6) {
    case 0: s += 1; break;
    case 1: s ^= 0x5555; break;
    case 2: s *= 7; break;
    case 3: s = ~s; break;
    case 4: s = __brev(s); break;
    default: s = s << 3 | s >> 29;
  }
  out[threadIdx.x] = s;
}

// Last block done adds up: threadfence and an atomic ticket.
__device__ unsigned ticket;
extern "C" __global__ void last_block(const int* in, int* partial, int* total) {
  __shared__ int sum;
  __shared__ bool last;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, in[blockIdx.x * 64 + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(&ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    int t = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) t += partial[i];
    *total = t;
  }
}
