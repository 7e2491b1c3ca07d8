// cp.async: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy, non-bulk". Copies of 4 to 16 bytes
// that each thread issues for itself, in the generic proxy: for operands that no tensor map describes.
#pragma once

#include <cstdint>

namespace ptx {

// cp.async.ca, 4 bytes, global to shared.
__device__ __forceinline__ void cp_async_ca_4(uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(source) : "memory");
}

// cp.async.mbarrier.arrive.noinc: one arrival, made when every earlier cp.async of this thread has landed. The
// barrier's count includes it (that is what noinc says).
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace ptx
