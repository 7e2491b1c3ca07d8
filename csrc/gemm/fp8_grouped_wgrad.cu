// fp8_grouped_wgrad: D[g] = A[:, columns of g] * B[:, columns of g]^T, weight gradients of all experts from gradients
// and activations that are transposed once: A [M, S] and B [N, S] E4M3 with a scale per row and 128 columns (tokens).
//
// A group is a range of k-blocks of one matrix, so that one tensor map serves them all and none is ever rewritten. A
// tile has as many k-blocks as its group, none in an empty one, whose tiles are zeros, or left alone when accumulating.
// Roles, barriers and budget: gemm/fp8_tile.cuh.
#include "gemm/fp8_grouped_wgrad_params.h"
#include "gemm/fp8_store.cuh"
#include "gemm/fp8_tile.cuh"

namespace dsv3 {
namespace {

template <class Tile>
__device__ __forceinline__ void wgrad(const Fp8GroupedWgradParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  initialise_ring<Tile>(shared, &p.a, &p.b, p.blocks);

  // visit(group, first k-block, k-blocks, corner): this CTA's tiles, in the same order for every warp. Offsets that no
  // caller may pass stay inside the tensors.
  const auto for_each_tile = [&p](auto visit) {
    const int per_group = p.m_tiles * p.n_tiles;
    for (int tile = first_tile<Tile>(); tile < p.groups * per_group; tile += tile_step<Tile>()) {
      const int group = tile / per_group;
      const int begin = max(p.offsets[group] / kTileK, 0);
      const int end = min(p.offsets[group + 1] / kTileK, p.blocks);
      visit(group, begin, max(end - begin, 0), rasterise<Tile>(tile - group * per_group, p.m_tiles, p.n_tiles));
    }
  };

  Slot<Tile> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0 && ptx::elect_sync()) {
      for_each_tile([&](int, int first, int blocks, TilePlace at) {
        load_operands(shared, slot, &p.a, {at.m, 0}, &p.b, {at.n, 0}, first, blocks);
      });
      ptx::griddepcontrol_launch_dependents();
      drain(shared, slot);
    } else if (warp == 1) {
      for_each_tile([&](int, int first, int blocks, TilePlace at) {
        load_scales<BScale::kRow>(shared, slot, p.a_scale, 0, at.m, p.m - at.m, p.b_scale, 0, at.n, p.n - at.n, first,
                                  blocks);
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Tile> me(warp);
    for_each_tile([&](int group, int, int blocks, TilePlace at) {
      if (blocks == 0 && p.out.accumulate) return;
      float results[Tile::kWaves][Tile::kResults];
      multiply_tile<BScale::kRow>(shared, slot, me, at.n, blocks, results);
      store_tile(me.slab(shared), me, p.out, group, at.m, at.n, p.m - at.m, p.n - at.n, results);
    });
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_wgrad_128x128(const __grid_constant__ dsv3::Fp8GroupedWgradParams p) {
  dsv3::wgrad<dsv3::Tile<128, 128>>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_wgrad_256x128(const __grid_constant__ dsv3::Fp8GroupedWgradParams p) {
  dsv3::wgrad<dsv3::Tile<256, 128>>(p);
}

// A pair, named by what both CTAs have.
extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_wgrad_256x256(const __grid_constant__ dsv3::Fp8GroupedWgradParams p) {
  dsv3::wgrad<dsv3::Tile<256, 128, 2>>(p);
}
