// Producer of an FP8 cache: rows of 512 E4M3 codes, 4 float32 scales and 64 bfloat16 become the tiles that the
// consumers of a bfloat16 cache take. A key is bf16(code * bf16(scale)): exact where the scale is a power of two.
//
// Four warps have 16 rows of a tile each, which lie in one page whatever its size. A lane has 16 codes of a row. Loads
// of 8 rows are on their way while the tile's place is waited for, and the next tile's bytes come into L2 meanwhile.
// Cost per row: 32 lanes x (32 shifts and masks + 12 for NaN + 16 multiplications), 15 cycles of the SM's four
// schedulers; a row of 656 bytes takes 31 (H200) or 44 (H100) cycles to arrive from memory.
#pragma once

#include "mla/decode_tile.cuh"

namespace dsv3 {

constexpr int kFp8Warps = 4;
constexpr int kWarpRows = kDecodeKeys / kFp8Warps;
constexpr int kRowsInFlight = 4;
static_assert(kRowsInFlight == 4, "eight lanes for each row's rotary part");
static_assert(kWarpRows == 16, "the smallest page: a warp's rows lie in one");
static_assert(kDecodeFp8Bytes % 16 == 0, "rows start at multiples of 16 bytes");

// Codes to bfloat16. The bits of a code are put where bfloat16 has sign, exponent and mantissa, which makes 2^-120
// times its value, subnormals included; 2^120 is 0x7B80. Two codes at a time: `select` says which (prmt).
__device__ __forceinline__ uint32_t decode_two(uint32_t codes, uint32_t select, uint32_t scale) {
  const uint32_t high = __byte_perm(codes, 0, select);  // each code as the high byte of a half
  const uint32_t bits = (high >> 4 & 0x07F007F0) | (high & 0x80008000);
  return ptx::mul_rn_bf16x2(ptx::mul_rn_bf16x2(bits, 0x7B807B80), scale);
}

// Where a code is NaN (0x7F or 0xFF), the key is.
__device__ __forceinline__ uint32_t nan_of(uint32_t codes, uint32_t select) {
  const uint32_t magnitude = __byte_perm(codes, 0, select) & 0x7F007F00;
  return ((magnitude & 0xFFFF) == 0x7F00 ? 0x7FFF : 0) | (magnitude >> 16 == 0x7F00 ? 0x7FFF0000 : 0);
}

// 16 codes as two chunks of 16 bytes.
__device__ __forceinline__ void decode_sixteen(const uint4& codes, float scale, uint4 (&keys)[2]) {
  const uint32_t factor = ptx::cvt_rn_bf16x2_f32(scale, scale);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[8], nans = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = decode_two(words[i], 0x1404, factor);
    pairs[2 * i + 1] = decode_two(words[i], 0x3424, factor);
    nans |= ((words[i] & 0x7F7F7F7F) + 0x01010101) & 0x80808080;
  }
  if (nans != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] |= nan_of(words[i], 0x1404);
      pairs[2 * i + 1] |= nan_of(words[i], 0x3424);
    }
  }
  keys[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  keys[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

__device__ __forceinline__ void prefetch_l2(const uint8_t* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// What a lane has of kRowsInFlight rows on their way: 16 codes of each, and their scale.
struct RowsInFlight {
  uint4 codes[kRowsInFlight];
  float scales[kRowsInFlight];
  // Row `row` of `rows` into place `i`; one that does not exist is zeros and is not read.
  __device__ __forceinline__ void load(int i, const uint8_t* rows, int row, bool exists, int lane) {
    const uint8_t* source = rows + row * static_cast<int>(kDecodeFp8Bytes);
    codes[i] = exists ? __ldg(reinterpret_cast<const uint4*>(source) + lane) : make_uint4(0, 0, 0, 0);
    scales[i] = exists ? __ldg(reinterpret_cast<const float*>(source + kDecodeLatent) + lane / 8) : 0.0f;
  }
};

// All four warps, this one being number `warp`. Rows past the item's last key become zeros.
__device__ __forceinline__ void load_fp8_tiles(const MlaDecodeParams& p, uint32_t shared, Slot& slot, int warp,
                                               const Item& item) {
  const int lane = threadIdx.x % 32;
  const int* table = p.table + item.request * p.table_stride;
  // This warp's rows of a tile, from key `first` on: how many exist, and where they begin.
  const auto count_of = [&](int first) { return min(max(item.last - first, 0), kWarpRows); };
  const auto place_of = [&](int first) {
    if (first >= item.last) return p.cache;
    const int row = first & ((1 << p.page_bits) - 1);
    return p.cache + __ldg(table + (first >> p.page_bits)) * p.cache_page_stride + row * kDecodeFp8Bytes;
  };
  int first = item.first + kWarpRows * warp;
  const uint8_t* rows = place_of(first);
  RowsInFlight flight;
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) flight.load(i, rows, i, i < count_of(first), lane);
#pragma unroll 1
  for (; first - kWarpRows * warp < item.last; first += kDecodeKeys) {
    const uint8_t* next = place_of(first + kDecodeKeys);
    for (int i = 128 * lane; i < count_of(first + kDecodeKeys) * static_cast<int>(kDecodeFp8Bytes); i += 128 * 32) {
      prefetch_l2(next + i);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      ptx::mbarrier_wait_parity(shared + slot.empty(half), slot.parity ^ 1);
    }
    const uint32_t tile = shared + slot.tile();
#pragma unroll 1
    for (int begin = 0; begin < kWarpRows; begin += kRowsInFlight) {
      const bool last = begin + kRowsInFlight == kWarpRows;  // the rows to load are the next tile's
      const uint8_t* source = last ? next : rows + (begin + kRowsInFlight) * static_cast<int>(kDecodeFp8Bytes);
      const int left = last ? count_of(first + kDecodeKeys) : count_of(first) - begin - kRowsInFlight;
      const int rope_row = begin + lane / 8;  // 8 lanes have the 128 bytes of a row's rotary part
      uint4 rope = make_uint4(0, 0, 0, 0);
      if (rope_row < count_of(first)) {
        const uint8_t* row = rows + rope_row * static_cast<int>(kDecodeFp8Bytes) + kDecodeLatent + 16;
        rope = __ldg(reinterpret_cast<const uint4*>(row) + lane % 8);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        uint4 keys[2];
        decode_sixteen(flight.codes[i], flight.scales[i], keys);
        flight.load(i, source, i, i < left, lane);
        // Every other four lanes store their second chunk first: eight lanes then meet eight different banks of 16
        // bytes.
        const int row = kWarpRows * warp + begin + i, late = lane >> 2 & 1;
        st_shared_16(tile + swizzled(row, 2 * lane + late), late ? keys[1] : keys[0]);
        st_shared_16(tile + swizzled(row, 2 * lane + 1 - late), late ? keys[0] : keys[1]);
      }
      st_shared_16(tile + swizzled(kWarpRows * warp + rope_row, 64 + lane % 8), rope);
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) ptx::mbarrier_arrive(shared + slot.full(half));
    }
    rows = next;
    slot.advance();
  }
}

}  // namespace dsv3
