// fp8_masked_gemm: D[g, :counts[g]] = A[g, :counts[g]] * B[g]^T for A [G, Tmax, K]: every group has Tmax rows of memory
// and uses the first counts[g]. E4M3 with a scale per row of A and per 128 x 128 block (or row) of each B[g].
//
// The tensor map of A has the group as a dimension of its own, so that no tile reaches another group's rows whatever
// Tmax is. Groups without rows cost nothing; tiles are found as in fp8_grouped_gemm.
// Roles, barriers and budget: gemm/fp8_tile.cuh.
#include "gemm/fp8_masked_gemm_params.h"
#include "gemm/fp8_store.cuh"
#include "gemm/fp8_tile.cuh"
#include "gemm/group_walk.cuh"

namespace dsv3 {
namespace {

template <class Tile, BScale kScale>
__device__ __forceinline__ void gemm(const Fp8MaskedGemmParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  initialise_ring<Tile>(shared, &p.a, &p.b, p.blocks);

  // Counts that no caller may pass stay inside the tensors.
  const auto rows_of = [&p](int group) { return RowRange{0, min(max(p.counts[group], 0), p.rows)}; };
  // visit(group, row of the group, rows left in it, column): this CTA's tiles, in the same order for every warp.
  const auto for_each_tile = [&](auto visit) {
    GroupWalk<Tile> walk;
    GroupTile tile;
    for (int t = blockIdx.x; walk.find(t, p.groups, p.n_tiles, rows_of, tile); t += gridDim.x) {
      const TilePlace at = rasterise<Tile>(tile.tile, (tile.rows.count + Tile::kRows - 1) / Tile::kRows, p.n_tiles);
      visit(tile.group, at.m, tile.rows.count - at.m, at.n);
    }
  };

  Slot<Tile> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      const bool elected = ptx::elect_sync();
      for_each_tile([&](int group, int row, int, int column) {
        if (elected) load_operands(shared, slot, &p.a, {row, group}, &p.b, {column, group}, 0, p.blocks);
        __syncwarp();
      });
    } else if (warp == 1) {
      for_each_tile([&](int group, int row, int rows, int column) {
        load_scales<kScale>(shared, slot, p.a_scale, group, row, rows, p.b_scale, group, column, p.n - column, 0,
                            p.blocks);
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Tile> me(warp);
    for_each_tile([&](int group, int row, int rows, int column) {
      float results[Tile::kWaves][Tile::kResults];
      multiply_tile<kScale>(shared, slot, me, column, p.blocks, results);
      store_tile(me.slab(shared), me, p.out, group, row, column, rows, p.n - column, results);
    });
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_128x128_block(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 128>, dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_128x128_row(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<128, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_64x128(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<64, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_32x128(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<32, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_16x128(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<16, 128>, dsv3::BScale::kRow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_8x128(const __grid_constant__ dsv3::Fp8MaskedGemmParams p) {
  dsv3::gemm<dsv3::Tile<8, 128>, dsv3::BScale::kRow>(p);
}
