// Which tile a product takes: a pure function of its sizes and the number of SMs.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace dsv3 {

struct TileSize {
  int64_t m, n;
};

inline int64_t tiles_along(int64_t extent, int64_t tile) {
  return (extent + tile - 1) / tile;
}

// Cycles of one tile by the budget in gemm/fp8_tile.cuh: shared memory at 128 bytes a cycle for each of `blocks`
// k-blocks (wgmma reads 64 rows of A and all of B per warpgroup and wave; the copies write both), and the output at the
// 64 bytes a cycle that an SM sends to L2.
inline int64_t tile_cycles(TileSize tile, int64_t blocks, int64_t out_bytes) {
  const int64_t block = tile.m / 64 * (64 + tile.n) + tile.m + tile.n;
  return blocks * block + tile.m * tile.n * out_bytes / 64;
}

// The tile with the fewest cycles for `groups` products of `m` by `n`, when whole waves of `sms` tiles run one after
// the other; the earlier one in the list on a tie.
inline TileSize choose_tile(std::initializer_list<TileSize> tiles, int64_t groups, int64_t m, int64_t n, int64_t blocks,
                            int64_t out_bytes, int64_t sms) {
  TileSize best = *tiles.begin();
  int64_t fewest = -1;
  for (const TileSize tile : tiles) {
    const int64_t count = groups * tiles_along(m, tile.m) * tiles_along(n, tile.n);
    const int64_t cycles = tiles_along(count, sms) * tile_cycles(tile, blocks, out_bytes);
    if (fewest < 0 || cycles < fewest) {
      best = tile;
      fewest = cycles;
    }
  }
  return best;
}

}  // namespace dsv3
