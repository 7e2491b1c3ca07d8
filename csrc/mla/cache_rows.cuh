// Rows of a latent cache on the device: where they are, and copies of them.
#pragma once

#include <cstdint>

#include "mla/cache_format.h"

namespace dsv3 {

// Address of a slot.
template <class Byte>
__device__ __forceinline__ Byte* cache_row(Byte* cache, int64_t page, int64_t place, int64_t page_stride,
                                           uint32_t row_bytes) {
  return cache + page * page_stride + place * row_bytes;
}

// `bytes` from source to destination by one warp, in units that both are aligned to; four loads in flight a lane.
template <class Unit>
__device__ __forceinline__ void copy_bytes(uint8_t* destination, const uint8_t* source, uint32_t bytes, int lane) {
  const uint32_t units = bytes / sizeof(Unit);
  for (uint32_t base = lane; base < units; base += 4 * 32) {
    Unit held[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (base + 32 * i < units) held[i] = reinterpret_cast<const Unit*>(source)[base + 32 * i];
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (base + 32 * i < units) reinterpret_cast<Unit*>(destination)[base + 32 * i] = held[i];
    }
  }
}
__device__ __forceinline__ void copy_bytes(uint8_t* destination, const uint8_t* source, uint32_t bytes, bool vectors,
                                           int lane) {
  if (vectors) {
    copy_bytes<uint4>(destination, source, bytes, lane);
  } else {
    copy_bytes<uint16_t>(destination, source, bytes, lane);
  }
}
__device__ __forceinline__ void zero_bytes(uint8_t* destination, uint32_t bytes, int lane) {
  for (uint32_t i = lane; i < bytes / 2; i += 32) reinterpret_cast<uint16_t*>(destination)[i] = 0;
}

}  // namespace dsv3
