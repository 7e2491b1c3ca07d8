// Which sequence owns a tile of rows, when only the device knows where sequences begin and end.
#pragma once

#include <cstdint>

namespace dsv3 {

// Bounds of the rows of `total` that each of `count` sequences owns: cu[b] to cu[b + 1].
struct Sequences {
  const int32_t* cu;
  int32_t count;
  int32_t total;
};

struct RowRange {
  int begin, count;
};

// Rows of group `group`: sequence group - 1; group 0 and the last one are the rows before and after all sequences.
// Bounds that no caller may pass stay inside the tensor.
__device__ __forceinline__ RowRange rows_of(const Sequences& s, int group) {
  const int begin = group == 0 ? 0 : min(max(s.cu[group - 1], 0), s.total);
  const int end = group > s.count ? s.total : min(max(s.cu[group], begin), s.total);
  return {begin, end - begin};
}

// The other side's rows of the same group: nothing belongs to rows of no sequence.
__device__ __forceinline__ RowRange partners_of(const Sequences& s, int group) {
  return group == 0 || group > s.count ? RowRange{0, 0} : rows_of(s, group);
}

struct SequenceTile {
  int group;
  RowRange rows;  // of the group
  int tile;       // within the group, of `heads` times its row tiles
};

// Tiles are numbered group by group. A warp walks with rising tile numbers, 32 groups at a time, each lane knowing one.
template <int kRows>
class SequenceWalk {
 public:
  // Whether there is such a tile. The whole warp takes part.
  __device__ __forceinline__ bool find(int tile, const Sequences& s, int heads, SequenceTile& found) {
    const int lane = threadIdx.x % 32, groups = s.count + 2;
    for (;;) {
      const uint32_t beyond = __ballot_sync(~0u, tile < end_);
      if (beyond != 0) {
        const int owner = __ffs(beyond) - 1;
        found.group = next_ - 32 + owner;
        found.rows.begin = __shfl_sync(~0u, rows_.begin, owner);
        found.rows.count = __shfl_sync(~0u, rows_.count, owner);
        found.tile = tile - (__shfl_sync(~0u, end_, owner) - (found.rows.count + kRows - 1) / kRows * heads);
        return true;
      }
      if (next_ >= groups) return false;
      rows_ = next_ + lane < groups ? rows_of(s, next_ + lane) : RowRange{0, 0};
      int sum = (rows_.count + kRows - 1) / kRows * heads;
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
