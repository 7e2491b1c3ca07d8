// The sum over K that the CTAs of a cluster shared out, for a swapped tile (fp8_tile.cuh) without a workspace.
//
// Warp w of every CTA holds a part of the same 16 x kN results. Those of warp w belong to the CTA of rank w % split:
// the others send theirs into its shared memory, 16 bytes a lane (st.async, counted in bytes by the receiving warp's
// own barrier), and are done; it adds all parts in the order of rank, so that the sum's bits never vary, and has the
// result. Every CTA owns at least one warp's results and waits for them, so none ends while somebody may still write to
// it.
#pragma once

#include "gemm/fp8_tile.cuh"

namespace dsv3 {

// Whether this warp has the sum. A cluster works on one tile: nothing that is received makes room for more.
// The caller arrived at the cluster's barrier when its own barriers were initialised. On return `slab` is memory of
// this warp's own for its output: what it has received and read.
template <class Tile>
__device__ __forceinline__ bool sum_over_cluster(uint32_t shared, const Consumer<Tile>& me, uint32_t split,
                                                 uint32_t rank, float (&results)[Tile::kResults], uint32_t& slab) {
  const uint32_t warp = me.of_cta(), owner = warp % split;
  const uint32_t barrier = shared + Tile::kSums + 8 * warp;
  slab = shared + Tile::kSlabs + warp / split * (split - 1) * Tile::kPartialBytes;
  const uint32_t mine = slab + 16 * me.lane;
  ptx::barrier_cluster_wait();  // the owner runs, and its barriers are initialised
  if (owner != rank) {
    const uint32_t there = ptx::mapa(mine + (rank < owner ? rank : rank - 1) * Tile::kPartialBytes, owner);
    const uint32_t there_barrier = ptx::mapa(barrier, owner);
#pragma unroll
    for (int i = 0; i < Tile::kResults; i += 4) {
      ptx::st_async_v4(there + 128 * i, results[i], results[i + 1], results[i + 2], results[i + 3], there_barrier);
    }
    return false;
  }
  if (me.lane == 0) ptx::mbarrier_arrive_expect_tx(barrier, (split - 1) * Tile::kPartialBytes);
  ptx::mbarrier_wait_parity_cluster(barrier, 0);
  float sum[Tile::kResults] = {};
  uint32_t received = mine;
#pragma unroll 1
  for (uint32_t from = 0; from < split; ++from) {
    if (from == rank) {
#pragma unroll
      for (int i = 0; i < Tile::kResults; ++i) sum[i] += results[i];
      continue;
    }
#pragma unroll
    for (int i = 0; i < Tile::kResults; i += 4) {
      const float4 part = ld_shared_four(received + 128 * i);
      sum[i] += part.x, sum[i + 1] += part.y, sum[i + 2] += part.z, sum[i + 3] += part.w;
    }
    received += Tile::kPartialBytes;
  }
#pragma unroll
  for (int i = 0; i < Tile::kResults; ++i) results[i] = sum[i];
  return true;
}

}  // namespace dsv3
