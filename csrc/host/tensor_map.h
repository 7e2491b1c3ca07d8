// Tensor maps of the shapes that the kernels use. Encoded for every call (about a microsecond): a cache keyed by the
// address would outlive the tensor. Extents and boxes count elements, innermost first in the driver's order; strides
// count elements here and bytes there.
#pragma once

#include "host/driver.h"

namespace dsv3 {

constexpr uint64_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

// A row-major [rows, columns] matrix, in boxes of [box_rows, box_columns].
inline TensorMap tensor_map_2d(Driver& driver, const char* op, const char* argument, CUtensorMapDataType type,
                               const void* address, uint64_t rows, uint64_t columns, uint64_t row_stride,
                               uint32_t box_rows, uint32_t box_columns, CUtensorMapSwizzle swizzle,
                               CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const uint64_t dims[2] = {columns, rows};
  const uint64_t strides[1] = {row_stride * element_bytes(type)};
  const uint32_t box[2] = {box_columns, box_rows};
  return driver.encode(op, argument, type, 2, address, dims, strides, box, swizzle, promotion);
}

// [planes, rows, columns], each dimension with a stride of its own, in boxes of [box_planes, box_rows, box_columns].
inline TensorMap tensor_map_3d(Driver& driver, const char* op, const char* argument, CUtensorMapDataType type,
                               const void* address, uint64_t planes, uint64_t rows, uint64_t columns,
                               uint64_t plane_stride, uint64_t row_stride, uint32_t box_planes, uint32_t box_rows,
                               uint32_t box_columns, CUtensorMapSwizzle swizzle,
                               CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const uint64_t dims[3] = {columns, rows, planes};
  const uint64_t strides[2] = {row_stride * element_bytes(type), plane_stride * element_bytes(type)};
  const uint32_t box[3] = {box_columns, box_rows, box_planes};
  return driver.encode(op, argument, type, 3, address, dims, strides, box, swizzle, promotion);
}

}  // namespace dsv3
