// TMA and bulk copies: PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor".
//
// One thread issues. Loads complete on an mbarrier of the destination CTA, in bytes: the full box, even where it hangs
// over the tensor's edge and is filled with zeros. Stores and reductions complete on the issuing thread's bulk group.
// Coordinates count elements, innermost first; those of a store must not be negative. Shared addresses are 32-bit and
// 128-byte aligned (1024 for the 128-byte swizzle that wgmma reads), sizes of plain bulk copies multiples of 16 bytes.
#pragma once

#include <cstdint>

#include "ptx/tensor_map_type.h"

namespace ptx {

// L2 policies as createpolicy.fractional makes them at fraction 1.0 (PTX ISA, createpolicy). Hints only.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;
constexpr uint64_t kEvictNormal = 0x1000000000000000;

// prefetch.tensormap
__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.2d, global to shared
__device__ __forceinline__ void cp_async_bulk_tensor_2d_g2s(uint32_t destination, const TensorMap* map,
                                                            uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d_g2s(uint32_t destination, const TensorMap* map,
                                                            uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d_g2s(uint32_t destination, const TensorMap* map,
                                                            uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// ... with an L2 policy
__device__ __forceinline__ void cp_async_bulk_tensor_2d_g2s_hint(uint32_t destination, const TensorMap* map,
                                                                 uint32_t barrier, int c0, int c1, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d_g2s_hint(uint32_t destination, const TensorMap* map,
                                                                 uint32_t barrier, int c0, int c1, int c2,
                                                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d_g2s_hint(uint32_t destination, const TensorMap* map,
                                                                 uint32_t barrier, int c0, int c1, int c2, int c3,
                                                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// ... to every CTA of the cluster whose bit is set in `mask`, at the same offset; each one's barrier gets the bytes
__device__ __forceinline__ void cp_async_bulk_tensor_2d_g2s_multicast(uint32_t destination, const TensorMap* map,
                                                                      uint32_t barrier, int c0, int c1, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(mask)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d_g2s_multicast(uint32_t destination, const TensorMap* map,
                                                                      uint32_t barrier, int c0, int c1, int c2,
                                                                      uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(mask)
      : "memory");
}

// cp.async.bulk.tensor, shared to global
__device__ __forceinline__ void cp_async_bulk_tensor_2d_s2g(const TensorMap* map, uint32_t source, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_3d_s2g(const TensorMap* map, uint32_t source, int c0, int c1,
                                                            int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d_s2g(const TensorMap* map, uint32_t source, int c0, int c1,
                                                            int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// cp.reduce.async.bulk.tensor.add, shared to global; the map's type chooses the arithmetic
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_2d_add(const TensorMap* map, uint32_t source, int c0,
                                                                   int c1) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_3d_add(const TensorMap* map, uint32_t source, int c0,
                                                                   int c1, int c2) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// cp.async.bulk.prefetch.tensor: a box into L2.
__device__ __forceinline__ void cp_async_bulk_prefetch_tensor_2d(const TensorMap* map, int c0, int c1) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(c0), "r"(c1)
               : "memory");
}

// cp.async.bulk without a map: contiguous bytes, both addresses 16-byte aligned.
__device__ __forceinline__ void cp_async_bulk_g2s(uint32_t destination, const void* source, uint32_t bytes,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_s2g(void* destination, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
}
// ... into another CTA's shared memory, on that CTA's barrier (both addresses from mapa).
__device__ __forceinline__ void cp_async_bulk_s2s(uint32_t destination, uint32_t source, uint32_t bytes,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// cp.async.bulk.commit_group, wait_group: the issuing thread's stores. After wait_group.read the sources may be
// overwritten; after wait_group the writes are done.
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace ptx
