// wgmma: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// D[64, N] (float32, N/2 registers a thread) = A[64, K] * B[N, K]^T (+ D). K is 16 for bf16, 32 for e4m3. `ss` takes A
// from shared memory by descriptor, `rs` from four registers; B is always a descriptor. scale_d = 0 ignores D's old
// value. The order: wgmma_fence (after anything else touched D or A's registers), wgmmas, wgmma_commit_group,
// wgmma_wait_group, and only then D is read, A's registers are rewritten or the operands' shared memory is released.
#pragma once

#include <cstdint>

namespace ptx {

// wgmma.fence, commit_group, wait_group.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7, "PTX ISA, wgmma.wait_group: N");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving copies of the accumulators into a running wgmma: before the fence and after the
// commit.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Swizzle as a matrix descriptor names it (not as a tensor map does).
enum class Swizzle : uint64_t { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

// Shared memory matrix descriptor (PTX ISA, "Matrix Descriptor Format"): address and byte offsets are kept without
// their low four bits, the address below 256 KB. K-major, swizzled: the leading offset is unused (16), the stride
// offset is 8 rows of the swizzle's span. Adding bytes / 16 to a descriptor moves its start.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// clang-format off
// Operand lists by number of accumulator registers.
#define DSV3_D4 "%0, %1, %2, %3"
#define DSV3_D8 DSV3_D4 ", %4, %5, %6, %7"
#define DSV3_D16 DSV3_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV3_D32 DSV3_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV3_D48 DSV3_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DSV3_D64 DSV3_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV3_D80 DSV3_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DSV3_D96 DSV3_D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DSV3_D128 DSV3_D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DSV3_A4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define DSV3_A8(i) DSV3_A4(i), DSV3_A4((i) + 4)
#define DSV3_A16(i) DSV3_A8(i), DSV3_A8((i) + 8)
#define DSV3_A32(i) DSV3_A16(i), DSV3_A16((i) + 16)
#define DSV3_A48(i) DSV3_A32(i), DSV3_A16((i) + 32)
#define DSV3_A64(i) DSV3_A32(i), DSV3_A32((i) + 32)
#define DSV3_A80(i) DSV3_A64(i), DSV3_A16((i) + 64)
#define DSV3_A96(i) DSV3_A64(i), DSV3_A32((i) + 64)
#define DSV3_A128(i) DSV3_A64(i), DSV3_A64((i) + 64)
// clang-format on

// The four forms for N columns; C = N / 2 accumulators, and P0 to P6 name the operands C to C + 6 that come after
// them. bf16 operands may be MN-major in shared memory (transpose 1); e4m3 ones are K-major always.
#define DSV3_WGMMA(N, C, P0, P1, P2, P3, P4, P5, P6)                                                               \
  template <int kTransposeA = 0, int kTransposeB = 0>                                                              \
  __device__ __forceinline__ void wgmma_bf16_ss(float (&d)[C], uint64_t a, uint64_t b, int scale_d) {              \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                 "k16.f32.bf16.bf16 {" DSV3_D##C "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 "; }"                   \
                 : DSV3_A##C(0)                                                                                    \
                 : "l"(a), "l"(b), "r"(scale_d), "n"(kTransposeA), "n"(kTransposeB));                              \
  }                                                                                                                \
  template <int kTransposeB = 0>                                                                                   \
  __device__ __forceinline__ void wgmma_bf16_rs(float (&d)[C], const uint32_t (&a)[4], uint64_t b, int scale_d) {  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                 "k16.f32.bf16.bf16 {" DSV3_D##C "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 "; }" \
                 : DSV3_A##C(0)                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransposeB));            \
  }                                                                                                                \
  __device__ __forceinline__ void wgmma_e4m3_ss(float (&d)[C], uint64_t a, uint64_t b, int scale_d) {              \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                 "k32.f32.e4m3.e4m3 {" DSV3_D##C "}, " P0 ", " P1 ", p, 1, 1; }"                                   \
                 : DSV3_A##C(0)                                                                                    \
                 : "l"(a), "l"(b), "r"(scale_d));                                                                  \
  }                                                                                                                \
  __device__ __forceinline__ void wgmma_e4m3_rs(float (&d)[C], const uint32_t (&a)[4], uint64_t b, int scale_d) {  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                  \
                 "k32.f32.e4m3.e4m3 {" DSV3_D##C "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1; }"         \
                 : DSV3_A##C(0)                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                              \
  }

DSV3_WGMMA(8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
DSV3_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DSV3_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DSV3_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
DSV3_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
DSV3_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
DSV3_WGMMA(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
DSV3_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
DSV3_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef DSV3_WGMMA
#undef DSV3_D4
#undef DSV3_A4
#undef DSV3_D8
#undef DSV3_A8
#undef DSV3_D16
#undef DSV3_A16
#undef DSV3_D32
#undef DSV3_A32
#undef DSV3_D48
#undef DSV3_A48
#undef DSV3_D64
#undef DSV3_A64
#undef DSV3_D80
#undef DSV3_A80
#undef DSV3_D96
#undef DSV3_A96
#undef DSV3_D128
#undef DSV3_A128

}  // namespace ptx
