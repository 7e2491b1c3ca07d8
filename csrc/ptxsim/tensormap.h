// The simulator's own 128-byte encoding of a tensor map. Opaque to kernels, as the hardware's is; it travels by value.
#pragma once
#include <cstdint>
#include <string>

namespace ptxsim {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x54584d50;
  uint64_t address;
  uint32_t magic;
  uint8_t type, rank, interleave, swizzle;
  uint64_t stride[4];   // bytes, of dimensions 1..
  uint32_t dimLast[5];  // elements - 1
  uint8_t boxLast[5];   // elements - 1
  uint8_t elementStride[5];
  uint8_t promotion, fill;
  uint8_t pad[128 - 8 - 8 - 32 - 20 - 12];
  uint64_t dim(unsigned d) const { return (uint64_t)dimLast[d] + 1; }
  uint32_t box(unsigned d) const { return (uint32_t)boxLast[d] + 1; }
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

// CUtensorMapDataType
enum TensorType : uint8_t {
  kMapU8,
  kMapU16,
  kMapU32,
  kMapS32,
  kMapU64,
  kMapS64,
  kMapF16,
  kMapF32,
  kMapF64,
  kMapBf16,
  kMapF32Ftz,
  kMapTf32,
  kMapTf32Ftz
};
inline unsigned mapElementBytes(unsigned type) {
  static const uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type < sizeof kBytes ? kBytes[type] : 0;
}
// The rules of cuTensorMapEncodeTiled. Returns an empty string or what is wrong.
std::string encodeTensorMap(TensorMap* map, unsigned type, uint32_t rank, uint64_t address, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                            unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill);

}  // namespace ptxsim
