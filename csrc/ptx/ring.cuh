// A ring of stages in shared memory, each with mbarriers that say full and empty.
#pragma once

#include <cstdint>

namespace ptx {

// A place in the ring, and the parity to wait for there. Consumers wait for `parity` of full; producers wait for
// `parity ^ 1` of empty, so that a fresh stage counts as empty.
template <int kStages>
struct RingSlot {
  static_assert(kStages > 1, "a ring of one stage is a barrier");
  uint32_t stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if constexpr (kStages == 2) {
      stage ^= 1;
      parity ^= stage == 0;
    } else if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace ptx
