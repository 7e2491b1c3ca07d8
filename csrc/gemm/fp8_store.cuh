// Output of a tile (fp8_tile.cuh), in bfloat16 or float32, added to what is there or not. Each warp stores its own
// rows, without a barrier, and stops at the last row and column that it is told: a tile may end inside another group's
// rows. Of a swapped tile a warp has 16 columns, 32 bytes of bfloat16 in each row: whole sectors.
#pragma once

#include <cuda_bf16.h>

#include "gemm/fp8_tile.cuh"
#include "ptx/convert.cuh"

namespace dsv3 {

template <class T>
struct Pair;
template <>
struct Pair<float> {
  using Type = float2;
  static __device__ __forceinline__ float2 widen(float2 pair) { return pair; }
  static __device__ __forceinline__ float2 round(float x, float y) { return make_float2(x, y); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
  static __device__ __forceinline__ __nv_bfloat162 round(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

// visit(i, address): accumulators i and i + 1 of this thread's wave belong at address[0] and address[1].
template <class T, class Tile, class Visit>
__device__ __forceinline__ void for_each_pair(const Consumer<Tile>& me, int wave, T* corner, int64_t row_stride,
                                              int rows, int columns, Visit visit) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = me.row(wave) + 8 * half;
    if (row >= rows) continue;
    T* address = corner + row * row_stride + me.column();
#pragma unroll
    for (int i = 2 * half; i < Tile::kResults; i += 4) {
      if (8 * (i >> 2) < columns) visit(i, address + 8 * (i >> 2));
    }
  }
}

// With kVectors a pair is one access, otherwise two.
template <class T, bool kVectors, class Tile>
__device__ __forceinline__ void add_old(const Consumer<Tile>& me, int wave, const T* corner, int64_t row_stride,
                                        int rows, int columns, float (&results)[Tile::kResults]) {
  for_each_pair(me, wave, corner, row_stride, rows, columns, [&](int i, const T* address) {
    typename Pair<T>::Type pair;
    if (kVectors) {
      pair = *reinterpret_cast<const typename Pair<T>::Type*>(address);
    } else {
      pair.x = address[0], pair.y = address[1];
    }
    const float2 old = Pair<T>::widen(pair);
    results[i] += old.x, results[i + 1] += old.y;
  });
}
template <class T, bool kVectors, class Tile>
__device__ __forceinline__ void store_pairs(const Consumer<Tile>& me, int wave, T* corner, int64_t row_stride, int rows,
                                            int columns, const float (&results)[Tile::kResults]) {
  for_each_pair(me, wave, corner, row_stride, rows, columns, [&](int i, T* address) {
    const typename Pair<T>::Type pair = Pair<T>::round(results[i], results[i + 1]);
    if (kVectors) {
      *reinterpret_cast<typename Pair<T>::Type*>(address) = pair;
    } else {
      address[0] = pair.x, address[1] = pair.y;
    }
  });
}

__device__ __forceinline__ uint4 ld_shared_line(uint32_t address) {
  uint4 line;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
               : "r"(address)
               : "memory");
  return line;
}

// bfloat16 through `slab`, shared memory of this warp's own, 64 columns at a time: fragments in by stmatrix, whole
// lines of 128 bytes out. The 16-byte chunks of a row are permuted by its index, so that neither side meets a bank
// twice.
template <class Tile>
__device__ __forceinline__ void store_lines(uint32_t slab, const Consumer<Tile>& me, int wave, __nv_bfloat16* corner,
                                            int64_t row_stride, int rows, int columns,
                                            const float (&results)[Tile::kResults]) {
  const int in_row = me.lane % 16, out_row = me.lane / 8, chunk = me.lane % 8;
#pragma unroll
  for (int part = 0; part < Tile::kN / 64; ++part) {
    __syncwarp();  // the slab has been read
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 16 columns
      const float* f = results + 32 * part + 8 * j;
      ptx::stmatrix_x4(slab + in_row * 128 + (((2 * j + me.lane / 16) ^ (in_row % 8)) << 4),
                       ptx::cvt_rn_bf16x2_f32(f[0], f[1]), ptx::cvt_rn_bf16x2_f32(f[2], f[3]),
                       ptx::cvt_rn_bf16x2_f32(f[4], f[5]), ptx::cvt_rn_bf16x2_f32(f[6], f[7]));
    }
    __syncwarp();
    const int column = 64 * part + 8 * chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = out_row + 4 * i;
      const uint4 line = ld_shared_line(slab + row * 128 + ((chunk ^ (row % 8)) << 4));
      if (me.first_row(wave) + row < rows && column < columns) {
        *reinterpret_cast<uint4*>(corner + (me.first_row(wave) + row) * row_stride + column) = line;
      }
    }
  }
}

// The same of a swapped tile. visit(i, address): accumulator i belongs at address[0].
template <class T, class Tile, class Visit>
__device__ __forceinline__ void for_each_swapped(const Consumer<Tile>& me, T* corner, int64_t row_stride, int rows,
                                                 int columns, Visit visit) {
#pragma unroll
  for (int i = 0; i < Tile::kResults; ++i) {
    const int row = 8 * (i >> 2) + me.column() + (i & 1), column = me.row(0) + 8 * (i >> 1 & 1);
    if (row < rows && column < columns) visit(i, corner + row * row_stride + column);
  }
}

// bfloat16 through `slab` again: 8 x 8 blocks in, transposed by stmatrix, a row's 16 columns
// out as two chunks of 16 bytes. The two swap places in every other four rows, so that neither side meets a bank twice.
template <class Tile>
__device__ __forceinline__ void store_swapped_lines(uint32_t slab, const Consumer<Tile>& me, __nv_bfloat16* corner,
                                                    int64_t row_stride, int rows, int columns,
                                                    const float (&results)[Tile::kResults]) {
  const auto place = [slab](int row, int chunk) { return slab + row * 32 + ((chunk ^ (row >> 2 & 1)) << 4); };
  __syncwarp();  // the slab has been read
#pragma unroll
  for (int i = 0; i < Tile::kResults; i += 8) {  // 16 rows; lanes 8 j to 8 j + 7 address block j
    const int row = 2 * i + me.lane % 8 + (me.lane >= 16 ? 8 : 0);
    const float* f = results + i;
    if constexpr (Tile::kResults == 4) {
      ptx::stmatrix_x2_trans(place(me.lane % 8, me.lane / 8 % 2), ptx::cvt_rn_bf16x2_f32(f[0], f[1]),
                             ptx::cvt_rn_bf16x2_f32(f[2], f[3]));
    } else {
      ptx::stmatrix_x4_trans(place(row, me.lane / 8 % 2), ptx::cvt_rn_bf16x2_f32(f[0], f[1]),
                             ptx::cvt_rn_bf16x2_f32(f[2], f[3]), ptx::cvt_rn_bf16x2_f32(f[4], f[5]),
                             ptx::cvt_rn_bf16x2_f32(f[6], f[7]));
    }
  }
  __syncwarp();
  const int chunk = me.lane % 2, column = me.first_row(0) + 8 * chunk;
#pragma unroll
  for (int i = 0; i < (Tile::kRows + 15) / 16; ++i) {
    const int row = 16 * i + me.lane / 2;
    if (row < min(rows, Tile::kRows) && column < columns) {
      *reinterpret_cast<uint4*>(corner + row * row_stride + column) = ld_shared_line(place(row, chunk));
    }
  }
}

template <class T, bool kVectors, class Tile>
__device__ __forceinline__ void store_swapped_as(uint32_t slab, const Consumer<Tile>& me, const OutputView& out,
                                                 int64_t corner, int rows, int columns,
                                                 float (&results)[Tile::kResults]) {
  T* data = static_cast<T*>(out.data) + corner;
  if (out.accumulate) {
    for_each_swapped(me, data, out.row_stride, rows, columns,
                     [&](int i, const T* address) { results[i] += static_cast<float>(*address); });
  }
  if constexpr (kVectors && sizeof(T) == 2) {
    store_swapped_lines(slab, me, data, out.row_stride, rows, columns, results);
  } else {
    for_each_swapped(me, data, out.row_stride, rows, columns,
                     [&](int i, T* address) { *address = static_cast<T>(results[i]); });
  }
}

// A swapped tile, as store_tile below. Float32 needs no vectors: a store of a warp's is four rows of 32 bytes.
template <class Tile>
__device__ __forceinline__ void store_swapped_tile(uint32_t slab, const Consumer<Tile>& me, const OutputView& out,
                                                   int group, int64_t row, int column, int rows, int columns,
                                                   float (&results)[Tile::kResults]) {
  const int64_t corner = group * out.group_stride + row * out.row_stride + column;
  if (out.is_float32) {
    store_swapped_as<float, false>(slab, me, out, corner, rows, columns, results);
  } else if (out.vectors) {
    store_swapped_as<__nv_bfloat16, true>(slab, me, out, corner, rows, columns, results);
  } else {
    store_swapped_as<__nv_bfloat16, false>(slab, me, out, corner, rows, columns, results);
  }
}

template <class T, bool kVectors, class Tile>
__device__ __forceinline__ void store_as(uint32_t slab, const Consumer<Tile>& me, const OutputView& out, int64_t corner,
                                         int rows, int columns, float (&results)[Tile::kWaves][Tile::kResults]) {
  T* data = static_cast<T*>(out.data) + corner;
#pragma unroll
  for (int wave = 0; wave < Tile::kWaves; ++wave) {
    if (out.accumulate) add_old<T, kVectors>(me, wave, data, out.row_stride, rows, columns, results[wave]);
    if constexpr (kVectors && sizeof(T) == 2) {
      store_lines(slab, me, wave, data, out.row_stride, rows, columns, results[wave]);
    } else {
      store_pairs<T, kVectors>(me, wave, data, out.row_stride, rows, columns, results[wave]);
    }
  }
}

// Stores, by way of this warp's `slab`, the tile whose corner is (row, column) of group `group`; `rows` and `columns`
// are what is left from there on.
template <class Tile>
__device__ __forceinline__ void store_tile(uint32_t slab, const Consumer<Tile>& me, const OutputView& out, int group,
                                           int64_t row, int column, int rows, int columns,
                                           float (&results)[Tile::kWaves][Tile::kResults]) {
  if constexpr (Tile::kSwapped) {
    return store_swapped_tile(slab, me, out, group, row, column, rows, columns, results[0]);
  }
  const int64_t corner = group * out.group_stride + row * out.row_stride + column;
  if (out.is_float32) {
    if (out.vectors) {
      store_as<float, true>(slab, me, out, corner, rows, columns, results);
    } else {
      store_as<float, false>(slab, me, out, corner, rows, columns, results);
    }
  } else {
    if (out.vectors) {
      store_as<__nv_bfloat16, true>(slab, me, out, corner, rows, columns, results);
    } else {
      store_as<__nv_bfloat16, false>(slab, me, out, corner, rows, columns, results);
    }
  }
}

}  // namespace dsv3
