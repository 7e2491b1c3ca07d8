// From the launchers' arguments to what parameter structs hold: the host side of gemm/fp8_tile.cuh.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "gemm/fp8_params.h"
#include "gemm/fp8_select.h"
#include "gemm/launchers.h"
#include "host/tensor_map.h"

namespace dsv3 {

constexpr int64_t kGemmBlock = 128;  // of K: one scale, one stage

// Extents and numbers of tiles are 32-bit in the kernels.
inline int32_t to_int32(const char* op, const char* what, int64_t value) {
  if (value > std::numeric_limits<int32_t>::max() - (1 << 20)) {
    throw Error(std::string(op) + ": " + what + ": got " + std::to_string(value) + ", wanted less than 2^31 - 2^20");
  }
  return static_cast<int32_t>(value);
}

// Boxes of one tile's rows and one k-block, swizzled as wgmma's descriptors say. An operand without columns has no map:
// its kernel reads none. The stride of a dimension of one row means nothing, and may be what no map takes.
inline TensorMap operand_map(Driver& driver, const char* op, const char* argument, const GemmOperand& x, int64_t rows) {
  if (x.columns == 0 || x.rows == 0 || x.groups == 0) return {};
  const int64_t row_stride = x.rows > 1 ? x.row_stride : (x.columns + 15) / 16 * 16;
  const int64_t group_stride = x.groups > 1 ? x.group_stride : x.rows * row_stride;
  return tensor_map_3d(driver, op, argument, CU_TENSOR_MAP_DATA_TYPE_UINT8, x.data, x.groups, x.rows, x.columns,
                       group_stride, row_stride, 1, static_cast<uint32_t>(rows), kGemmBlock,
                       CU_TENSOR_MAP_SWIZZLE_128B);
}

// Offsets within a tile are 32-bit in the kernels.
inline ScaleView scale_view(const char* op, const char* argument, const GemmScale& scale, int64_t operand_rows) {
  if (scale.row_stride >= 1 << 24) {
    throw Error(std::string(op) + ": " + argument + ": got a row stride of " + std::to_string(scale.row_stride) +
                " elements, wanted less than 2^24");
  }
  return {static_cast<const float*>(scale.data), scale.group_stride, scale.row_stride, scale.block_stride,
          scale.rows == operand_rows ? 1 : 128};
}

inline OutputView output_view(const GemmOutput& out) {
  const int64_t vector = out.is_float32 ? 2 : 8;  // elements per store
  const int64_t bytes = vector * (out.is_float32 ? 4 : 2);
  const bool vectors = reinterpret_cast<uintptr_t>(out.data) % bytes == 0 && out.row_stride % vector == 0 &&
                       out.group_stride % vector == 0;
  return {out.data, out.group_stride, out.row_stride, out.is_float32, vectors, out.accumulate};
}

// What every parameter struct has of a product in tiles of `kernel`: each CTA of a cluster copies its part of A's rows,
// and its columns' of B.
template <class Params>
void set_operands(Params& params, Driver& driver, const char* op, const char* a_name, const GemmOperand& a,
                  const GemmScale& a_scale, const char* b_name, const GemmOperand& b, const GemmScale& b_scale,
                  const GemmOutput& out, const Fp8Kernel& kernel) {
  params.a = operand_map(driver, op, a_name, a, kernel.tile.m / kernel.ctas);
  params.b = operand_map(driver, op, b_name, b, kernel.tile.n / kernel.ctas);
  params.a_scale = scale_view(op, "a_scale", a_scale, a.rows);
  params.b_scale = scale_view(op, "b_scale", b_scale, b.rows);
  params.out = output_view(out);
  params.n = to_int32(op, "N", out.columns);
  params.blocks = to_int32(op, "K", tiles_along(a.columns, kGemmBlock));
  params.n_tiles = static_cast<int32_t>(tiles_along(out.columns, kernel.tile.n));
}

// Bytes moved per element of an output.
inline int64_t output_bytes(const GemmOutput& out) { return (out.is_float32 ? 4 : 2) * (out.accumulate ? 2 : 1); }

// Bytes from the first element to the last.
inline size_t span(int64_t groups, int64_t group_stride, int64_t rows, int64_t row_stride, int64_t columns,
                   int64_t column_stride, int64_t bytes) {
  if (groups == 0 || rows == 0 || columns == 0) return 0;
  return ((groups - 1) * group_stride + (rows - 1) * row_stride + (columns - 1) * column_stride + 1) * bytes;
}

inline Buffer buffer(const GemmOperand& x) {
  return {x.data, span(x.groups, x.group_stride, x.rows, x.row_stride, x.columns, 1, 1), Access::kRead};
}
inline Buffer buffer(const GemmScale& x) {
  return {x.data, span(x.groups, x.group_stride, x.rows, x.row_stride, x.blocks, x.block_stride, 4), Access::kRead};
}
inline Buffer buffer(const GemmOutput& x) {
  return {x.data, span(x.groups, x.group_stride, x.rows, x.row_stride, x.columns, 1, x.is_float32 ? 4 : 2),
          x.accumulate ? Access::kReadWrite : Access::kWrite};
}

// The choice for a launch, by what its operands say.
inline Fp8Plan plan_launch(Driver& driver, Fp8Op op, int64_t groups, const GemmOperand& a, const GemmOperand& b,
                           const GemmScale& b_scale, const GemmOutput& out, const GemmChoice& choice,
                           const Target& target) {
  return plan_fp8(op, {groups, out.rows, out.columns, a.columns, b_scale.rows == b.rows, output_bytes(out)}, choice,
                  driver.multiprocessors(target));
}

// One CTA per SM, or a cluster per tile where there are fewer.
inline Dim3 persistent_grid(int64_t tiles, const Fp8Plan& plan) {
  return {static_cast<unsigned>(std::min(tiles * plan.kernel->ctas, plan.ctas)), 1, 1};
}

}  // namespace dsv3
