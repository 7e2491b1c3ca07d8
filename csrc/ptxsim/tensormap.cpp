#include "tensormap.h"

namespace ptxsim {

std::string encodeTensorMap(TensorMap* map, unsigned type, uint32_t rank, uint64_t address, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                            unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
  if (!map || (uintptr_t)map % 64) return "the tensor map must lie at a multiple of 64 bytes";
  if (type >= kMapTypeCount) return cat("unknown data type ", type);
  if (rank < 1 || rank > 5) return cat("rank ", rank, " is not in 1..5");
  if (interleave != 0) return "only CU_TENSOR_MAP_INTERLEAVE_NONE is modelled";
  if (!address || address % 16) return "the global address must be a multiple of 16 bytes";
  if (swizzle > 3) return cat("unknown swizzle ", swizzle);
  if (promotion > 3) return cat("unknown L2 promotion ", promotion);
  if (fill > 1) return cat("unknown out-of-bounds fill ", fill);
  if (fill == 1 && type < kFirstFloatMapType) return "NaN fill needs a floating-point data type";
  if (!dims || !box || !elementStrides || (rank > 1 && !strides)) return "an array is missing";
  TensorMap t{address, TensorMap::kMagic, (uint8_t)type, (uint8_t)rank, (uint8_t)swizzle, (uint8_t)fill};
  for (uint32_t d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > (1ull << 32)) return cat("globalDim[", d, "] = ", dims[d], " is not in 1..2^32");
    if (box[d] < 1 || box[d] > 256) return cat("boxDim[", d, "] = ", box[d], " is not in 1..256");
    if (elementStrides[d] < 1 || elementStrides[d] > 8)
      return cat("elementStrides[", d, "] = ", elementStrides[d], " is not in 1..8");
    t.dimLast[d] = (uint32_t)(dims[d] - 1);
    t.boxLast[d] = (uint8_t)(box[d] - 1);
    t.elementStride[d] = (uint8_t)(d == 0 ? 1 : elementStrides[d]);
    if (d == 0) continue;
    const uint64_t s = t.stride[d - 1] = strides[d - 1];
    if (s % 16) return cat("globalStrides[", d - 1, "] = ", s, " is no multiple of 16 bytes");
    if (s >= (1ull << 40)) return cat("globalStrides[", d - 1, "] = ", s, " is not below 2^40");
  }
  const uint64_t inner = (uint64_t)box[0] * t.elementBytes();
  if (inner % 16) return cat("the inner box of ", inner, " bytes is no multiple of 16");
  if (swizzle && inner > (16u << swizzle))
    return cat("the inner box of ", inner, " bytes is wider than the swizzle of ", 16u << swizzle);
  memcpy(map, &t, sizeof t);
  return "";
}

}  // namespace ptxsim
