// Warp-level matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.7.14.5).
#include "matrix.h"

namespace ptxsim {
namespace {

// ---- 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the row addresses of matrix i; a lane holds two neighbours
// of row lane/4, of a transposed one (x[1]) of column lane/4.
template <bool Store>
void moveMatrices(Warp& w, const Inst& in, uint32_t) {
  const uint32_t m = kAll >> (kLanes - 8 * in.vec);
  Span s(w, in, m, 16, Store ? Kind::Write : Kind::Read);
  uint32_t changed = 0;  // rows, by the lane that addresses them
  for (unsigned j = 0; j < in.vec; ++j) {
    const Ref reg = in.ext->refs[j];
    uint32_t valid = Store ? w.validOf(reg) : kAll;
    for (unsigned l = 0; l < kLanes; ++l)
      for (unsigned k = 0; k < 2; ++k) {
        unsigned row = l / 4, col = 2 * (l % 4) + k;
        if (in.x[1]) std::swap(row, col);
        row += 8 * j;
        uint8_t *element = w.ptr<uint8_t>(reg) + 4 * l + 2 * k, *p = s.p[row] + 2 * col;
        uint8_t* v = s.valid((int)row, 2 * col);
        if (Store) {
          if (memcmp(p, element, 2)) changed |= 1u << row;
          memcpy(p, element, 2);
          markValid(v, 2, (valid >> l) & 1);
        } else {
          memcpy(element, p, 2);
          if (!allValid(v, 2)) valid &= ~(1u << l);
        }
      }
    if (!Store) w.setValid(reg, kAll, valid);
  }
  if (Store) s.written(w, in, m, changed);
}
void movmatrix(Warp& w, const Inst& in, uint32_t) {
  uint32_t valid = 0;
  setLanes<uint32_t>(w, in.d, kAll, valid, [&](int l) {
    const int low = 8 * (l % 4) + l / 8, high = low + 4, shift = l / 4 % 2 * 16;  // the lanes with its two elements
    valid |= (w.validOf(in.a) >> low & w.validOf(in.a) >> high & 1) << l;
    const uint32_t* a = w.ptr<const uint32_t>(in.a);
    return (a[low] >> shift & 0xffff) | a[high] >> shift << 16;
  });
}
void decodeMove(Dec& d) {
  const bool load = d.p.op[0] == "ldmatrix";
  d.out.vec = (uint8_t)(1u << d.out.x[0]);
  d.out.x[0] = 0;
  d.wantArgs(2);
  d.operands(load ? "{d:b32} [a]" : "[a] {e:b32}");
  d.out.fn = load ? moveMatrices<false> : moveMatrices<true>;
}

// ---- mma.sync m16n8kK. refs: D registers; refs2: those of A, B and C
void mma(Warp& w, const Inst& in, uint32_t) {
  MatrixOperands m;
  const auto& s = owned<MatrixShape>(in);
  const unsigned nb = s.k * typeBytes(s.b) / 16;  // registers of B, half of those of A
  const Ref *a = in.ext->refs2.data(), *b = a + 2 * nb;
  operandFromRegisters(w, a, 2 * nb, s.a, true, m);
  operandFromRegisters(w, b, nb, s.b, false, m);
  multiplyMatrices(w, s, m, b + nb, in.ext->refs.data());
  ++w.launch->n.mma;
}

void decodeMma(Dec& d) {
  auto& s = own<MatrixShape>(d);
  s.k = 4u << d.out.x[0];
  s.saturate = d.out.x[1];
  matrixTypes(d, s);
  if (d.types[3] != s.d) d.fail("C and D must have one type");
  const unsigned nb = s.k * typeBytes(s.a) / 16;
  if (nb != 1 && nb != 2) d.fail("no such shape");
  d.wantArgs(4);
  Extra* e = d.extra();
  for (auto& o : d.elements(d.arg(0), s.accumulators())) e->refs.push_back(d.dst(o, 4));
  for (auto& o : d.elements(d.arg(1), 2 * nb)) e->refs2.push_back(d.src(o, Type::B32));
  for (auto& o : d.elements(d.arg(2), nb)) e->refs2.push_back(d.src(o, Type::B32));
  for (auto& o : d.elements(d.arg(3), s.accumulators()))
    e->refs2.push_back(d.src(o, s.d == Type::F32 ? Type::F32 : Type::B32));
  d.out.fn = mma;
}

const Forms kForms = {
    {"ldmatrix|stmatrix", "sync aligned m8n8 x1|x2|x4 trans? space b16", nullptr, decodeMove},
    {"movmatrix", "sync aligned m8n8 trans b16", "d:b32 a:b32", movmatrix},
    {"mma", "sync aligned row col m16n8k4|m16n8k8|m16n8k16|m16n8k32 satfinite? type type type type", nullptr,
     decodeMma},
};

// How the tensor cores of sm_90 add, measured on H100 and H200 (tests/ptxsim/hardware): of the products of one step and
// of the accumulator everything is cut off that lies more than `align` bits below the largest exponent among them,
// where a product's exponent is the sum of its factors'. A float32 sum is cut off after `mantissa` bits, a float16 one
// rounded to nearest even. Infinities and NaN act as in IEEE arithmetic.
struct TensorCore {
  static constexpr unsigned kMaxK = MatrixOperands::kMaxK, kMaxN = MatrixOperands::kMaxN;
  const MatrixShape& s;
  const MatrixOperands& m;
  const bool half = s.d == Type::F16, fp8 = typeBytes(s.a) == 1, shortSums = fp8 && s.async;
  const int align = shortSums ? 13 : 25, mantissa = shortSums ? 13 : 23;
  int16_t exponentB[kMaxK][kMaxN];

  TensorCore(const MatrixShape& shape, const MatrixOperands& operands) : s(shape), m(operands) {
    for (unsigned k = 0; k < s.k; ++k)
      for (unsigned j = 0; j < s.n; ++j) exponentB[k][j] = exponent(m.B[k][j], s.a);
  }
  static int16_t exponent(float x, Type t) {
    const int least = t == Type::E4M3 ? -6 : t == Type::E5M2 || t == Type::F16 ? -14 : -126;
    return (int16_t)(x == 0 ? -9999 : std::max(least, (int)(bits(x) >> 23 & 0xff) - 127));
  }
  double narrow(double x) const {
    if (half) return fromF16((uint16_t)narrowFrom(x, kF16));
    if (std::fabs(x) < 0x1p-126) return std::trunc(x * 0x1p149) * 0x1p-149;
    return bitsAs<double>(bits(x) >> (52 - mantissa) << (52 - mantissa));
  }
  // sum[j] += the products of row i of A and column j of B over the k whose bits are set. F holds them exactly.
  template <class F>
  void step(unsigned i, uint32_t ks, double* sum) const {
    const unsigned n = s.n;
    int16_t top[kMaxN];
    F total[kMaxN], scale[kMaxN];
    for (unsigned j = 0; j < n; ++j) top[j] = exponent((float)sum[j], s.d);
    for (int k : lanesOf(ks)) {
      const int16_t e = exponent(m.A[i][k], s.a);
      for (unsigned j = 0; j < n; ++j) top[j] = std::max(top[j], (int16_t)(e + exponentB[k][j]));
    }
    constexpr int kLeast = sizeof(F) == 4 ? -100 : -300;  // below it are no products, nor sums of products
    for (unsigned j = 0; j < n; ++j) {
      scale[j] = (F)bitsAs<double>((uint64_t)(1023 + align - std::max<int>(top[j], kLeast)) << 52);
      total[j] = (F)std::trunc(sum[j] * scale[j]);
    }
    for (int k : lanesOf(ks)) {
      const F x = m.A[i][k];
      for (unsigned j = 0; j < n; ++j) total[j] += std::trunc(x * (F)m.B[k][j] * scale[j]);
    }
    for (unsigned j = 0; j < n; ++j)
      if (std::isfinite(total[j]))
        sum[j] = narrow((double)total[j] / scale[j] + 0.0);  // no -0
      else
        for (int k : lanesOf(ks)) sum[j] += (double)m.A[i][k] * m.B[k][j];
  }
  void row(unsigned i, double* sum) const {
    if (shortSums) return step<float>(i, kAll, sum);
    if (!fp8) return step<double>(i, kAll >> (kMaxK - s.k), sum);
    // ptxas makes two float16 products of an fp8 mma.sync, of elements 0 and 1 of every four and of 2 and 3, and adds
    // C.
    double product[kMaxN] = {};
    step<double>(i, 0x33333333, product);
    step<double>(i, 0xcccccccc, product);
    for (unsigned j = 0; j < s.n; ++j)
      sum[j] = half ? narrow(sum[j] + product[j]) : (double)((float)sum[j] + (float)product[j]);
  }
};

template <class Sum>
struct InOrder {  // of k, four at a time
  const MatrixShape& s;
  const MatrixOperands& m;
  void row(unsigned i, Sum* sum) const {
    for (unsigned k = 0; k < s.k; k += 4) {
      const Sum a0 = m.A[i][k], a1 = m.A[i][k + 1], a2 = m.A[i][k + 2], a3 = m.A[i][k + 3];
      const float *b0 = m.B[k], *b1 = m.B[k + 1], *b2 = m.B[k + 2], *b3 = m.B[k + 3];
      for (unsigned j = 0; j < s.n; ++j)
        sum[j] = std::fma(a3, (Sum)b3[j],
                          std::fma(a2, (Sum)b2[j], std::fma(a1, (Sum)b1[j], std::fma(a0, (Sum)b0[j], sum[j]))));
    }
  }
};

// Accumulator q of a lane has row lane/4 + 8 (q >> 1 & 1), column 8 (q / 4) + 2 (lane % 4) + (q & 1). A register holds
// one, or as float16 two. Sums of integers are exact in double.
template <class Adder, class Sum, unsigned kPer, bool kInteger = false>
void multiplyBy(Warp& w, const MatrixShape& s, const MatrixOperands& m, const Ref* c, const Ref* d) {
  Sum C[16][MatrixOperands::kMaxN];
  const unsigned n = s.n;
  auto row = [](unsigned q, unsigned l) { return l / 4 + 8 * (q >> 1 & 1); };
  auto column = [](unsigned q, unsigned l) { return q / 4 * 8 + l % 4 * 2 + (q & 1); };
  uint32_t valid[128];
  for (unsigned q = 0; q < n / 2; ++q) {
    const uint32_t* from = c ? w.ptr<const uint32_t>(c[q / kPer]) : nullptr;
    valid[q / kPer] = c ? w.validOf(c[q / kPer]) : kAll;
    for (unsigned l = 0; l < kLanes; ++l) {
      const uint32_t v = from ? from[l] : 0;
      C[row(q, l)][column(q, l)] = kInteger    ? (Sum)(int32_t)v
                                   : kPer == 2 ? (Sum)fromF16((uint16_t)(v >> (q % 2 * 16)))
                                               : (Sum)f32(v);
    }
  }
  const Adder adder{s, m};
  for (unsigned i = 0; i < 16; ++i) adder.row(i, C[i]);
  const bool anyBad = m.badRow.any() || m.badCol.any();
  for (unsigned q = 0; q < n / 2; q += kPer) {
    const Ref r = d[q / kPer];
    uint32_t* to = w.ptr<uint32_t>(r);
    for (unsigned l = 0; l < kLanes; ++l) {
      const unsigned i = row(q, l), j = column(q, l);
      const Sum x = C[i][j];
      if constexpr (kInteger)
        to[l] = (uint32_t)(int64_t)(s.saturate ? std::clamp<Sum>(x, INT32_MIN, INT32_MAX) : x);
      else
        to[l] = kPer == 2 ? toF16((float)x) | (uint32_t)toF16((float)C[i][j + 1]) << 16 : bits(canonical((float)x));
      if (anyBad && (m.badRow[i] || m.badCol[j] || m.badCol[j + kPer - 1])) valid[q / kPer] &= ~(1u << l);
    }
    w.setValid(r, kAll, valid[q / kPer]);
  }
}

}  // namespace

void matrixTypes(Dec& d, MatrixShape& s) {
  s.d = d.types[0], s.a = d.types[1], s.b = d.types[2];
  const bool fp8 = s.a == Type::E4M3 || s.a == Type::E5M2;
  if (!s.integer() && !s.half() && !fp8 && s.a != Type::TF32) d.fail("operand type is not supported");
  if (typeBytes(s.a) != typeBytes(s.b) || (typeBytes(s.a) > 1 && s.a != s.b)) d.fail("A and B must have one type");
  if (s.integer() ? s.d != Type::S32 : s.d != Type::F32 && !(s.d == Type::F16 && (s.a == Type::F16 || fp8)))
    d.fail("no such accumulator type");
}

void operandFromRegisters(Warp& w, const Ref* refs, unsigned count, Type t, bool isA, MatrixOperands& m) {
  const unsigned es = typeBytes(t), E = 4 / es;
  for (unsigned r = 0; r < count; ++r) {
    const uint8_t* p = w.ptr<const uint8_t>(refs[r]);
    for (unsigned l = 0; l < kLanes; ++l) {
      const unsigned mn = l / 4 + (isA ? 8 * (r & 1) : 0), k = E * (l % 4) + 4 * E * (isA ? r >> 1 : r);
      for (unsigned e = 0; e < E; ++e) (isA ? m.A[mn][k + e] : m.B[k + e][mn]) = matrixElement(t, p + 4 * l + e * es);
      if (!(w.validOf(refs[r]) >> l & 1)) (isA ? m.badRow : m.badCol).set(mn);
    }
  }
}

void multiplyMatrices(Warp& w, const MatrixShape& s, const MatrixOperands& m, const Ref* c, const Ref* d) {
  const bool hardware = w.launch->opt.hardwareRounding, half = s.d == Type::F16;
  const auto by = s.integer() ? multiplyBy<InOrder<double>, double, 1, true>
                  : hardware  ? half ? multiplyBy<TensorCore, double, 2> : multiplyBy<TensorCore, double, 1>
                  : half      ? multiplyBy<InOrder<float>, float, 2>
                              : multiplyBy<InOrder<float>, float, 1>;
  by(w, s, m, c, d);
}

}  // namespace ptxsim
