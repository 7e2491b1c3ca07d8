// Which group owns a tile, when only the device knows how many rows each group has.
#pragma once

#include <cstdint>

namespace dsv3 {

struct RowRange {
  int begin, count;
};

struct GroupTile {
  int group;
  RowRange rows;  // of the group
  int tile;       // within the group
};

// Tiles are numbered group by group; an empty group has none. A warp walks with rising tile numbers, 32 groups at a
// time, each lane knowing one: no search starts over, and no table has to be written before the first tile runs.
template <int kRows>
class GroupWalk {
 public:
  // Whether there is such a tile. `rows_of(group)` is called by one lane per group. The whole warp takes part.
  template <class RowsOf>
  __device__ __forceinline__ bool find(int tile, int groups, int n_tiles, RowsOf rows_of, GroupTile& found) {
    const int lane = threadIdx.x % 32;
    for (;;) {
      const uint32_t beyond = __ballot_sync(~0u, tile < end_);
      if (beyond != 0) {
        const int owner = __ffs(beyond) - 1;
        found.group = next_ - 32 + owner;
        found.rows.begin = __shfl_sync(~0u, rows_.begin, owner);
        found.rows.count = __shfl_sync(~0u, rows_.count, owner);
        const int tiles = (found.rows.count + kRows - 1) / kRows * n_tiles;
        found.tile = tile - (__shfl_sync(~0u, end_, owner) - tiles);
        return true;
      }
      if (next_ >= groups) return false;
      rows_ = next_ + lane < groups ? rows_of(next_ + lane) : RowRange{0, 0};
      int sum = (rows_.count + kRows - 1) / kRows * n_tiles;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += below;
      }
      end_ = __shfl_sync(~0u, end_, 31) + sum;
      next_ += 32;
    }
  }

 private:
  int next_ = 0;  // first group that no lane has looked at
  RowRange rows_{0, 0};
  int end_ = 0;  // tiles up to and with this lane's group
};

}  // namespace dsv3
