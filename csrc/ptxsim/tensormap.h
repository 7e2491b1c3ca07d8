// The simulator's own 128-byte encoding of a tensor map. Opaque to kernels, as the hardware's is; it travels by value.
#pragma once
#include "ptx.h"

namespace ptxsim {

struct MapType {  // a CUtensorMapDataType
  uint8_t bytes;
  Type reduction;  // None: there is none
};
// u8 u16 u32 s32 u64 s64, f16 f32 f64 bf16, f32 with flush to zero, tf32, tf32 with flush to zero
constexpr MapType kMapTypes[] = {{1, Type::None}, {2, Type::None}, {4, Type::U32}, {4, Type::S32}, {8, Type::U64},
                                 {8, Type::S64},  {2, Type::F16},  {4, Type::F32}, {8, Type::F64}, {2, Type::BF16},
                                 {4, Type::F32},  {4, Type::None}, {4, Type::None}};
constexpr unsigned kMapTypeCount = sizeof kMapTypes / sizeof kMapTypes[0], kFirstFloatMapType = 6;

struct TensorMap {
  static constexpr uint32_t kMagic = 0x54584d50;
  uint64_t address;
  uint32_t magic;
  uint8_t type, rank, swizzle, fill;
  uint64_t stride[4] = {};   // bytes, of dimensions 1..
  uint32_t dimLast[5] = {};  // elements - 1
  uint8_t boxLast[5] = {}, elementStride[5] = {};
  uint8_t pad[128 - 8 - 8 - 32 - 20 - 10] = {};
  uint64_t dim(unsigned d) const { return (uint64_t)dimLast[d] + 1; }
  uint32_t box(unsigned d) const { return (uint32_t)boxLast[d] + 1; }
  uint32_t count(unsigned d) const { return (box(d) + elementStride[d] - 1) / elementStride[d]; }  // copied elements
  unsigned elementBytes() const { return type < kMapTypeCount ? kMapTypes[type].bytes : 0; }
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

// The rules of cuTensorMapEncodeTiled. Returns an empty string or what is wrong.
std::string encodeTensorMap(TensorMap* map, unsigned type, uint32_t rank, uint64_t address, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                            unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill);

}  // namespace ptxsim
