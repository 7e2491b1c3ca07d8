// fp8_gemm: D [M, N] = A [M, K] * B [N, K]^T, E4M3 with a scale per row of A and per 128 x 128 block (or row) of B.
//
// Persistent CTAs of 384 threads take tiles with a stride of the grid: tile t is the same for every role, so
// nobody tells anybody. Roles, barriers and budget: gemm/fp8_tile.cuh. A result depends on its row of A and its row of
// B alone, not on M or on the grid. Where M is small, the CTAs of a cluster may share a tile's K (gemm/fp8_split.cuh):
// there is a cluster for every tile then, and a result depends on their number too. Where both are large, pairs of CTAs
// share their copies of A (128x256, 256x256: what a pair has).
#include "gemm/fp8_gemm_params.h"
#include "gemm/fp8_split.cuh"
#include "gemm/fp8_store.cuh"
#include "gemm/fp8_tile.cuh"

namespace dsv3 {
namespace {

__device__ __forceinline__ float bias_of(const Fp8GemmParams& p, int column) {
  return p.bias_is_float32 ? static_cast<const float*>(p.bias)[column]
                           : __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[column]);
}

template <class Tile>
__device__ __forceinline__ void add_bias(const Fp8GemmParams& p, const Consumer<Tile>& me, int column,
                                         float (&results)[Tile::kWaves][Tile::kResults]) {
  if constexpr (Tile::kSwapped) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = column + me.row(0) + 8 * half;
      const float bias = n < p.n ? bias_of(p, n) : 0;
#pragma unroll
      for (int i = 2 * half; i < Tile::kResults; i += 4) results[0][i] += bias, results[0][i + 1] += bias;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kResults; i += 4) {
      const int n = column + 8 * (i >> 2) + me.column();
      if (n >= p.n) continue;
      const float low = bias_of(p, n), high = bias_of(p, n + 1);
#pragma unroll
      for (int wave = 0; wave < Tile::kWaves; ++wave) {
        results[wave][i] += low, results[wave][i + 1] += high;
        results[wave][i + 2] += low, results[wave][i + 3] += high;
      }
    }
  }
}

template <class Tile, BScale kScale>
__device__ __forceinline__ void gemm(const Fp8GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  initialise_ring<Tile>(shared, &p.a, &p.b, p.blocks);

  // This CTA's share of a tile's k-blocks, and of the tiles.
  const int split = Tile::kSwapped ? p.split : 1, rank = split > 1 ? ptx::cluster_ctarank() : 0;
  const int first = p.blocks * rank / split, blocks = p.blocks * (rank + 1) / split - first;
  if (split > 1) ptx::barrier_cluster_arrive_relaxed();  // our barriers are initialised; waited for before a send
  const auto for_each_tile = [&p, split](auto visit) {
    const int step = tile_step<Tile>() / split;
    for (int tile = first_tile<Tile>() / split; tile < p.m_tiles * p.n_tiles; tile += step) {
      visit(rasterise<Tile>(tile, p.m_tiles, p.n_tiles));
    }
  };

  Slot<Tile> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0 && ptx::elect_sync()) {
      for_each_tile(
          [&](TilePlace at) { load_operands(shared, slot, &p.a, {at.m, 0}, &p.b, {at.n, 0}, first, blocks); });
      ptx::griddepcontrol_launch_dependents();
      drain(shared, slot);
    } else if (warp == 1) {
      for_each_tile([&](TilePlace at) {
        load_scales<kScale>(shared, slot, p.a_scale, 0, at.m, p.m - at.m, p.b_scale, 0, at.n, p.n - at.n, first,
                            blocks);
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Tile> me(warp);
    for_each_tile([&](TilePlace at) {
      float results[Tile::kWaves][Tile::kResults];
      multiply_tile<kScale>(shared, slot, me, at.n, blocks, results);
      uint32_t slab = me.slab(shared);
      if constexpr (Tile::kSwapped) {
        if (split > 1 && !sum_over_cluster(shared, me, split, rank, results[0], slab)) return;
      }
      if (p.bias != nullptr) add_bias(p, me, at.n, results);
      store_tile(slab, me, p.out, 0, at.m, at.n, p.m - at.m, p.n - at.n, results);
    });
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_128x128_block(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 128>, dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_128x128_row(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_256x128_block(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<256, 128>, dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_128x192_block(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 192>, dsv3::BScale::kBlock>(p);
}

// Pairs, named by what both CTAs have.
extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_128x256_block(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 128, 2>, dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_256x256_block(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<256, 128, 2>, dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_64x128(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<64, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_32x128(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<32, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_16x128(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<16, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_gemm_8x128(const __grid_constant__ dsv3::Fp8GemmParams p) {
  dsv3::gemm<dsv3::Tile<8, 128>, dsv3::BScale::kRow>(p);
}
