// rope: the pairs (a, b) of every row of x become (a cos - b sin, a sin + b cos), by the angles of the row's position.
//
// Products and sums are rounded one by one, as eager rounds them: both agree in every bit. A position outside the table
// makes its rows NaN.
//
// Roles     eight neighbouring threads per row (token and head), four pairs each at a time; no shared memory, no
// barrier Budget    2 + 2 bytes per bf16 element and 8 / heads of the table, each moved once: memory-bound. About six
//           instructions per element.
// Accesses  interleaved: 16 bytes of bf16 a thread, a row of 64 in one line of 128 bytes; halves: twice 8 bytes. Rows
//           that are not aligned to such accesses go pair by pair.
#include "mla/pack.cuh"
#include "mla/rope_params.h"
#include "mla/turn.cuh"

namespace dsv3 {
namespace {

// Four pairs of a row from `first` on, aligned.
template <class T, bool kInterleaved>
__device__ __forceinline__ void rotate(const RopeParams& p, const T* x, T* out, const float* angles, uint32_t first) {
  // In memory order: a b a b a b a b in one piece, or a a a a and b b b b in two.
  constexpr int kPieces = kInterleaved ? 1 : 2, kLength = 8 / kPieces;
  using Piece = Pack<T, kLength>;
  const uint32_t start[2] = {kInterleaved ? 2 * first : first, first + p.pairs};
  const auto cosine = *reinterpret_cast<const Pack<float, 4>*>(angles + first);
  const auto sine = *reinterpret_cast<const Pack<float, 4>*>(angles + p.pairs + first);
  Piece pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) pieces[i] = *reinterpret_cast<const Piece*>(x + start[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int a = kInterleaved ? 2 * i : i, b = kInterleaved ? 2 * i + 1 : i + 4;
    turn(pieces[a / kLength].values[a % kLength], pieces[b / kLength].values[b % kLength], cosine.values[i],
         p.transposed ? -sine.values[i] : sine.values[i]);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) *reinterpret_cast<Piece*>(out + start[i]) = pieces[i];
}

template <class T, bool kInterleaved>
__device__ __forceinline__ void rope(const RopeParams& p) {
  const uint32_t row = blockIdx.x * (kRopeThreads / kRopeLanes) + threadIdx.x / kRopeLanes;
  if (row >= p.rows) return;
  const uint32_t lane = threadIdx.x % kRopeLanes, token = row / p.heads, head = row % p.heads;
  const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
  const int64_t position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                                 : static_cast<const int32_t*>(p.positions)[token];
  if (position < 0 || position >= p.table_rows) {
    for (uint32_t i = lane; i < 2 * p.pairs; i += kRopeLanes) out[i] = narrow<T>(__uint_as_float(0x7FC00000));
    return;
  }
  const float* angles = p.cos_sin + position * p.table_stride;
  if (p.vectors) {
    for (uint32_t i = 4 * lane; i < p.pairs; i += 4 * kRopeLanes) rotate<T, kInterleaved>(p, x, out, angles, i);
  } else {
    for (uint32_t i = lane; i < p.pairs; i += kRopeLanes) {
      const uint32_t a = kInterleaved ? 2 * i : i, b = kInterleaved ? 2 * i + 1 : i + p.pairs;
      T real = x[a], imaginary = x[b];
      turn(real, imaginary, angles[i], p.transposed ? -angles[p.pairs + i] : angles[p.pairs + i]);
      out[a] = real, out[b] = imaginary;
    }
  }
}

template <class T>
__device__ __forceinline__ void rope(const RopeParams& p) {
  if (p.interleaved) {
    rope<T, true>(p);
  } else {
    rope<T, false>(p);
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kRopeThreads) rope_f32(const __grid_constant__ dsv3::RopeParams p) {
  dsv3::rope<float>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kRopeThreads) rope_bf16(const __grid_constant__ dsv3::RopeParams p) {
  dsv3::rope<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kRopeThreads) rope_f16(const __grid_constant__ dsv3::RopeParams p) {
  dsv3::rope<__half>(p);
}
