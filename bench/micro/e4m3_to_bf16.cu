// What it costs to make bfloat16 of E4M3 codes times a scale, by the bits and by the conversion instructions
// (docs/bench.md). 128 threads take 16 codes each from shared memory and fold what they make into a register, so that
// nothing but the conversion, a load of 16 bytes and eight exclusive ors is timed.
//
//   shipped     decode_sixteen of csrc/mla/decode_fp8.cuh: bits, with care for NaN
//   bits        the same without that care
//   intrinsics  cvt to float16, to float32, a product, cvt to bfloat16
//   nothing     the loop alone
#include "mla/decode_fp8.cuh"
#include "span.cuh"

namespace bench {

struct E4m3ToBf16Params {
  const uint8_t* codes;  // [4 * 2048], none of them NaN
  uint32_t* folded;      // [128 threads, 8] of CTA 0: the exclusive or of all turns
  Span* spans;           // [CTAs]
  float scale;
  uint32_t turns;
};
static_assert(sizeof(E4m3ToBf16Params) == 32, "bench/micro/__init__.py");

namespace {

constexpr int kThreads = 128, kTiles = 4, kTileBytes = kThreads * 16;

struct Shipped {
  static __device__ __forceinline__ void convert(const uint4& codes, float scale, uint4 (&keys)[2]) {
    dsv3::decode_sixteen(codes, scale, keys);
  }
};

struct Bits {
  static __device__ __forceinline__ void convert(const uint4& codes, float scale, uint4 (&keys)[2]) {
    const uint32_t factor = ptx::cvt_rn_bf16x2_f32(scale, scale);
    const auto low = [&](uint32_t word) { return dsv3::decode_two(word, 0x1404, factor); };
    const auto high = [&](uint32_t word) { return dsv3::decode_two(word, 0x3424, factor); };
    keys[0] = make_uint4(low(codes.x), high(codes.x), low(codes.y), high(codes.y));
    keys[1] = make_uint4(low(codes.z), high(codes.z), low(codes.w), high(codes.w));
  }
};

struct Intrinsics {
  static __device__ __forceinline__ uint32_t two(uint32_t codes, float scale) {
    const uint32_t halves = ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(codes));
    float low, high;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(halves));
    return ptx::cvt_rn_bf16x2_f32(low * scale, high * scale);
  }
  static __device__ __forceinline__ void convert(const uint4& codes, float scale, uint4 (&keys)[2]) {
    const auto low = [&](uint32_t word) { return two(word, scale); };
    const auto high = [&](uint32_t word) { return two(word >> 16, scale); };
    keys[0] = make_uint4(low(codes.x), high(codes.x), low(codes.y), high(codes.y));
    keys[1] = make_uint4(low(codes.z), high(codes.z), low(codes.w), high(codes.w));
  }
};

struct Nothing {
  static __device__ __forceinline__ void convert(const uint4& codes, float, uint4 (&keys)[2]) {
    keys[0] = keys[1] = codes;
  }
};

template <class Path>
__device__ __forceinline__ void run(const E4m3ToBf16Params& p) {
  __shared__ uint4 codes[kTiles * kThreads];
  for (int tile = 0; tile < kTiles; ++tile) {
    const int at = tile * kThreads + threadIdx.x;
    codes[at] = __ldg(reinterpret_cast<const uint4*>(p.codes) + at);
  }
  __syncthreads();
  const uint32_t mine = ptx::cvta_to_shared(codes) + 16 * threadIdx.x;
  uint4 folded[2] = {};
  const Stopwatch watch;
#pragma unroll 4
  for (uint32_t turn = 0; turn < p.turns; ++turn) {
    uint4 keys[2];
    Path::convert(dsv3::ld_shared_16(mine + turn % kTiles * kTileBytes), p.scale, keys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      folded[i].x ^= keys[i].x, folded[i].y ^= keys[i].y, folded[i].z ^= keys[i].z, folded[i].w ^= keys[i].w;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) watch.stop(p.spans + blockIdx.x);
  if (blockIdx.x == 0) {
    uint4* out = reinterpret_cast<uint4*>(p.folded) + 2 * threadIdx.x;
    out[0] = folded[0], out[1] = folded[1];
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) e4m3_shipped(const __grid_constant__ E4m3ToBf16Params p) {
  run<Shipped>(p);
}
extern "C" __global__ void __launch_bounds__(128) e4m3_bits(const __grid_constant__ E4m3ToBf16Params p) {
  run<Bits>(p);
}
extern "C" __global__ void __launch_bounds__(128) e4m3_intrinsics(const __grid_constant__ E4m3ToBf16Params p) {
  run<Intrinsics>(p);
}
extern "C" __global__ void __launch_bounds__(128) e4m3_nothing(const __grid_constant__ E4m3ToBf16Params p) {
  run<Nothing>(p);
}

}  // namespace bench
