// fp8_gemm: D [M, N] = A [M, K] * B [N, K]^T, E4M3 with a scale per row of A and per 128 x 128 block (or row) of B.
//
// Persistent CTAs of 384 threads take tiles with a stride of the grid: tile t is the same for every role, so
// nobody tells anybody. Roles, barriers and budget: gemm/fp8_tile.cuh. A result depends on its row of A and its row of
// B alone, not on M or on the grid.
#include "gemm/fp8_gemm_params.h"
#include "gemm/fp8_store.cuh"
#include "gemm/fp8_tile.cuh"

namespace dsv3 {
namespace {

template <class Tile>
__device__ __forceinline__ void add_bias(const Fp8GemmParams& p, const Consumer<Tile>& me, int column,
                                         float (&results)[Tile::kWaves][Tile::kResults]) {
#pragma unroll
  for (int i = 0; i < Tile::kResults; i += 4) {
    const int n = column + 8 * (i >> 2) + me.column();
    if (n >= p.n) continue;
    float low, high;
    if (p.bias_is_float32) {
      low = static_cast<const float*>(p.bias)[n], high = static_cast<const float*>(p.bias)[n + 1];
    } else {
      const __nv_bfloat16* bias = static_cast<const __nv_bfloat16*>(p.bias);
      low = __bfloat162float(bias[n]), high = __bfloat162float(bias[n + 1]);
    }
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave) {
      results[wave][i] += low, results[wave][i + 1] += high;
      results[wave][i + 2] += low, results[wave][i + 3] += high;
    }
  }
}

template <class Tile, BScale kScale>
__device__ __forceinline__ void gemm(const Fp8GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  const int tiles = p.m_tiles * p.n_tiles;
  initialise_ring<Tile>(shared, &p.a, &p.b, p.blocks);

  Slot<Tile> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0 && ptx::elect_sync()) {
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const TilePlace at = rasterise<Tile>(tile, p.m_tiles, p.n_tiles);
        load_operands(shared, slot, &p.a, {at.m, 0}, &p.b, {at.n, 0}, 0, p.blocks);
      }
    } else if (warp == 1) {
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const TilePlace at = rasterise<Tile>(tile, p.m_tiles, p.n_tiles);
        load_scales<kScale>(shared, slot, p.a_scale, 0, at.m, p.m - at.m, p.b_scale, 0, at.n, p.n - at.n, 0, p.blocks);
      }
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Tile> me(warp);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const TilePlace at = rasterise<Tile>(tile, p.m_tiles, p.n_tiles);
      float results[Tile::kWaves][Tile::kResults];
      multiply_tile<kScale>(shared, slot, me, at.n, p.blocks, results);
      if (p.bias != nullptr) add_bias(p, me, at.n, results);
      store_tile(shared, me, p.out, 0, at.m, at.n, p.m - at.m, p.n - at.n, results);
    }
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
