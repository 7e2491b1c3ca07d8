// dequantize: q * scale of e4m3 codes, with a scale per row and 128 columns or per 128 x 128, in float32, rounded once
// to float32, bf16 or f16.
//
// Roles     8 warps, one row each, as in quantize_1x128: a warp goes along its row in kDequantizeSteps steps, of as
// many
//           codes a lane as make 16 bytes of output. No shared memory, no barrier.
// Budget    bytes per element: 1 + 2 (bf16, f16) or 1 + 4 (float32), each moved once, and the scales, of which one
// serves
//           the lanes of a block. About 7 instructions per element (SASS): memory-bound.
// Accesses  loads 8 (4) bytes a lane, 256 (128) contiguous bytes a warp, all issued before the first is used; stores 16
//           bytes a lane, every sector whole. Rows that are not aligned to such accesses take the scalar ones.
#include "quant/dequantize_params.h"
#include "quant/encode.cuh"

namespace dsv3 {
namespace {

// Two numbers as they lie in memory.
__device__ __forceinline__ uint32_t round_pair(float low, float high, __nv_bfloat16) {
  return ptx::cvt_rn_bf16x2_f32(low, high);
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, __half) {
  return ptx::cvt_rn_f16x2_f32(low, high);
}

template <class T, bool kVectors>
__device__ __forceinline__ void dequantize(const DequantizeParams& p) {
  constexpr int kVector = 16 / sizeof(T);     // elements of a lane and step
  constexpr int kStepColumns = 32 * kVector;  // of one warp and step
  static_assert(kStepColumns * kDequantizeSteps == dequantize_columns(sizeof(T)), "the launcher's grid covers the row");

  const uint32_t block = blockIdx.x / p.chunks;
  const int64_t matrix = block / p.row_blocks;
  const int64_t row = static_cast<int64_t>(block % p.row_blocks) * kDequantizeRows + threadIdx.x / 32;
  if (row >= p.rows) return;  // whole warps leave
  const int64_t first =
      static_cast<int64_t>(blockIdx.x % p.chunks) * dequantize_columns(sizeof(T)) + threadIdx.x % 32 * kVector;
  const uint8_t* q = p.q + matrix * p.q_matrix_stride + row * p.q_row_stride;
  const float* scales = p.scale + matrix * p.scale_matrix_stride + (p.by_row ? row : row / 128) * p.scale_row_stride;
  T* out = static_cast<T*>(p.out) + (matrix * p.rows + row) * p.columns;

  uint32_t codes[kDequantizeSteps][kVector / 4] = {};
  float scale[kDequantizeSteps] = {};
#pragma unroll
  for (int step = 0; step < static_cast<int>(kDequantizeSteps); ++step) {
    const int64_t column = first + step * kStepColumns;
    if (column >= p.columns) break;
    scale[step] = scales[(column >> 7) * p.scale_block_stride];
    if constexpr (kVectors && kVector == 8) {
      const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(q + column));
      codes[step][0] = loaded.x, codes[step][1] = loaded.y;
    } else if constexpr (kVectors) {
      codes[step][0] = __ldg(reinterpret_cast<const uint32_t*>(q + column));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < p.columns) codes[step][i / 4] |= static_cast<uint32_t>(q[column + i]) << (8 * (i % 4));
      }
    }
  }
#pragma unroll
  for (int step = 0; step < static_cast<int>(kDequantizeSteps); ++step) {
    const int64_t column = first + step * kStepColumns;
    if (column >= p.columns) break;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      const uint32_t pair = ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(codes[step][i / 4] >> (8 * (i % 4))));
      values[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair))) * scale[step];
      values[i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16))) * scale[step];
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = round_pair(values[2 * i], values[2 * i + 1], T{});
      }
    }
    if constexpr (kVectors) {
      *reinterpret_cast<uint4*>(out + column) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int bit = i * static_cast<int>(sizeof(T)) * 8;
        if (column + i < p.columns) {
          reinterpret_cast<Bits<T>*>(out)[column + i] = static_cast<Bits<T>>(words[bit / 32] >> (bit % 32));
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void dequantize(const DequantizeParams& p) {
  if (p.vectors) {
    dequantize<T, true>(p);
  } else {
    dequantize<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kDequantizeThreads)
    dequantize_f32(const __grid_constant__ dsv3::DequantizeParams p) {
  dsv3::dequantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kDequantizeThreads)
    dequantize_bf16(const __grid_constant__ dsv3::DequantizeParams p) {
  dsv3::dequantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kDequantizeThreads)
    dequantize_f16(const __grid_constant__ dsv3::DequantizeParams p) {
  dsv3::dequantize<__half>(p);
}
