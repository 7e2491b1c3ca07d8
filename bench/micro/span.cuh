// How long a CTA's loop took: by the GPU's clock, in nanoseconds, and by its SM's, in cycles.
#pragma once

#include <cstdint>

namespace bench {

struct Span {
  uint64_t begin, end, cycles;
};

__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}
__device__ __forceinline__ uint64_t clock64() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

// One thread's, around what all threads of the CTA do between two barriers.
struct Stopwatch {
  uint64_t begin = globaltimer(), cycles = clock64();
  __device__ __forceinline__ void stop(Span* span) const {
    const uint64_t now = clock64();
    *span = {begin, globaltimer(), now - cycles};
  }
};

}  // namespace bench
