// D of a group = A of a group * B[g]^T, for groups of which only the device knows the rows: the body of
// fp8_grouped_gemm, whose groups lie one after the other in a matrix, and of fp8_masked_gemm, which has a plane of
// memory for each.
//
// Every warp finds its tiles by itself (group_walk.cuh): nothing is read by the host, empty groups cost nothing, rows
// that no group owns are neither loaded on purpose nor stored. Roles, barriers and budget: gemm/fp8_tile.cuh.
#pragma once

#include "gemm/fp8_grouped_gemm_params.h"
#include "gemm/fp8_store.cuh"
#include "gemm/fp8_tile.cuh"
#include "gemm/group_walk.cuh"

namespace dsv3 {

enum class Groups { kInARow, kInPlanes };

template <class Tile, BScale kScale, Groups kGroups>
__device__ __forceinline__ void multiply_groups(const Fp8GroupedGemmParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  initialise_ring<Tile>(shared, &p.a, &p.b, p.blocks);

  // Offsets and counts that no caller may pass stay inside the tensors.
  const auto rows_of = [&p](int group) {
    if (kGroups == Groups::kInPlanes) return RowRange{0, min(max(p.offsets[group], 0), p.rows)};
    const int begin = max(p.offsets[group], 0);
    return RowRange{begin, max(min(p.offsets[group + 1], p.rows) - begin, 0)};
  };
  // visit(group, plane of A and D, row in it, rows left in the group, column): this CTA's tiles, in the same order for
  // every warp.
  const auto for_each_tile = [&](auto visit) {
    GroupWalk<Tile::kRows> walk;
    GroupTile tile;
    for (int t = first_tile<Tile>(); walk.find(t, p.groups, p.n_tiles, rows_of, tile); t += tile_step<Tile>()) {
      const TilePlace at = rasterise<Tile>(tile.tile, (tile.rows.count + Tile::kRows - 1) / Tile::kRows, p.n_tiles);
      visit(tile.group, kGroups == Groups::kInPlanes ? tile.group : 0, tile.rows.begin + at.m, tile.rows.count - at.m,
            at.n);
    }
  };

  Slot<Tile> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      const bool elected = ptx::elect_sync();
      for_each_tile([&](int group, int plane, int row, int, int column) {
        if (elected) load_operands(shared, slot, &p.a, {row, plane}, &p.b, {column, group}, 0, p.blocks);
        __syncwarp();
      });
      ptx::griddepcontrol_launch_dependents();
      if (elected) drain(shared, slot);
    } else if (warp == 1) {
      for_each_tile([&](int group, int plane, int row, int rows, int column) {
        load_scales<kScale>(shared, slot, p.a_scale, plane, row, rows, p.b_scale, group, column, p.n - column, 0,
                            p.blocks);
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Tile> me(warp);
    for_each_tile([&](int, int plane, int row, int rows, int column) {
      float results[Tile::kWaves][Tile::kResults];
      multiply_tile<kScale>(shared, slot, me, column, p.blocks, results);
      store_tile(me.slab(shared), me, p.out, plane, row, column, rows, p.n - column, results);
    });
  }
}

}  // namespace dsv3
