#include "tensormap.h"

#include <cstring>

namespace ptxsim {

std::string encodeTensorMap(TensorMap* map, unsigned type, uint32_t rank, uint64_t address, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                            unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
  auto n = [](uint64_t v) { return std::to_string(v); };
  if (!map || (uintptr_t)map % 64) return "the tensor map must lie at a multiple of 64 bytes";
  const unsigned es = mapElementBytes(type);
  if (!es) return "unknown data type " + n(type);
  if (rank < 1 || rank > 5) return "rank " + n(rank) + " is not in 1..5";
  if (interleave != 0) return "only CU_TENSOR_MAP_INTERLEAVE_NONE is modelled";
  if (!address || address % 16) return "the global address must be a multiple of 16 bytes";
  if (swizzle > 3) return "unknown swizzle " + n(swizzle);
  if (promotion > 3) return "unknown L2 promotion " + n(promotion);
  if (fill > 1) return "unknown out-of-bounds fill " + n(fill);
  if (fill == 1 && (type < kMapF16)) return "NaN fill needs a floating-point data type";
  if (!dims || !box || !elementStrides || (rank > 1 && !strides)) return "an array is missing";
  TensorMap t;
  memset(&t, 0, sizeof t);
  for (uint32_t d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > (1ull << 32)) return "globalDim[" + n(d) + "] = " + n(dims[d]) + " is not in 1..2^32";
    if (box[d] < 1 || box[d] > 256) return "boxDim[" + n(d) + "] = " + n(box[d]) + " is not in 1..256";
    if (elementStrides[d] < 1 || elementStrides[d] > 8)
      return "elementStrides[" + n(d) + "] = " + n(elementStrides[d]) + " is not in 1..8";
    t.dimLast[d] = (uint32_t)(dims[d] - 1);
    t.boxLast[d] = (uint8_t)(box[d] - 1);
    t.elementStride[d] = (uint8_t)(d == 0 ? 1 : elementStrides[d]);
    if (d == 0) continue;
    const uint64_t s = strides[d - 1];
    if (s % 16) return "globalStrides[" + n(d - 1) + "] = " + n(s) + " is no multiple of 16 bytes";
    if (s >= (1ull << 40)) return "globalStrides[" + n(d - 1) + "] = " + n(s) + " is not below 2^40";
    t.stride[d - 1] = s;
  }
  const uint64_t inner = (uint64_t)box[0] * es;
  if (inner % 16) return "the inner box of " + n(inner) + " bytes is no multiple of 16";
  if (swizzle && inner > (16u << swizzle))
    return "the inner box of " + n(inner) + " bytes is wider than the swizzle of " + n(16u << swizzle);
  t.address = address;
  t.magic = TensorMap::kMagic;
  t.type = (uint8_t)type;
  t.rank = (uint8_t)rank;
  t.interleave = (uint8_t)interleave;
  t.swizzle = (uint8_t)swizzle;
  t.promotion = (uint8_t)promotion;
  t.fill = (uint8_t)fill;
  memcpy(map, &t, sizeof t);
  return "";
}

}  // namespace ptxsim
