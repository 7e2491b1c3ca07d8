// What mma.sync and wgmma share: a warp's 16 rows of D = A B + C, whose accumulators are registers.
#pragma once
#include <bitset>

#include "access.h"

namespace ptxsim {

struct MatrixShape {
  unsigned n = 8, k = 0;
  Type a = Type::None, b = Type::None, d = Type::None;
  bool saturate = false, async = false;  // async: wgmma
  bool integer() const { return a == Type::S8 || a == Type::U8; }
  bool half() const { return a == Type::F16 || a == Type::BF16; }
  unsigned accumulators() const { return d == Type::F16 ? n / 4 : n / 2; }  // registers
};
void matrixTypes(Dec& d, MatrixShape& s);  // of D, A and B, which the form names first: those that sm_90 has

struct MatrixOperands {  // float32 holds every type exactly
  static constexpr unsigned kMaxK = 32, kMaxN = 256;
  float A[16][kMaxK], B[kMaxK][kMaxN];
  using Bad = std::bitset<kMaxN>;
  Bad badRow, badCol;  // an element is undefined
};
// A warp's A or B from its registers: with E elements in each, g = lane/4 and q = lane%4, register r holds
//   of A: row g + 8 (r & 1), k = E q + 4 E (r >> 1) + e        of B: column g, k = E q + 4 E r + e
void operandFromRegisters(Warp& w, const Ref* refs, unsigned count, Type t, bool isA, MatrixOperands& m);
// D = A B + C, or A B when c is nullptr.
void multiplyMatrices(Warp& w, const MatrixShape& s, const MatrixOperands& m, const Ref* c, const Ref* d);

inline float matrixElement(Type t, const uint8_t* p) {
  uint32_t u = 0;
  switch (t) {
    case Type::E4M3: return kE4m3Table[*p];
    case Type::E5M2: return kE5m2Table[*p];
    case Type::S8: return (float)(int8_t)*p;
    case Type::U8: return (float)*p;
    case Type::BF16: memcpy(&u, p, 2); return fromBf16((uint16_t)u);
    case Type::F16: memcpy(&u, p, 2); return fromF16((uint16_t)u);
    default: memcpy(&u, p, 4); return f32(u & 0xffffe000u);  // tf32: the low 13 bits are ignored
  }
}

}  // namespace ptxsim
