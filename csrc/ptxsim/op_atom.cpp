// atom and red (PTX ISA 9.7.13.4 and on). Lanes act one after another, which is one of the orders the hardware may
// take.
#include "async.h"

namespace ptxsim {

enum AtomOp { kAdd, kMin, kMax, kAnd, kOr, kXor, kInc, kDec, kCas, kExch };

static uint16_t halfResult(int op, bool bf, uint16_t a, uint16_t b) {
  if (op != kAdd) return minOrMax(a, b, bf ? kBf16 : kF16, op == kMin);
  return bf ? narrowFrom((double)fromBf16(a) + (double)fromBf16(b), kBf16)
            : narrowFrom((double)fromF16(a) + (double)fromF16(b), kF16);
}
uint64_t atomicResult(int op, Type t, uint64_t old, uint64_t b) {
  const bool bf = t == Type::BF16 || t == Type::BF16x2;
  auto half = [&](unsigned shift) { return halfResult(op, bf, (uint16_t)(old >> shift), (uint16_t)(b >> shift)); };
  if (t == Type::F16 || t == Type::BF16) return half(0);
  if (t == Type::F16x2 || t == Type::BF16x2) return half(0) | (uint32_t)half(16) << 16;
  if (t == Type::F32 && op == kAdd) return bits(canonical(f32((uint32_t)old) + f32((uint32_t)b)));
  if (t == Type::F64 && op == kAdd) return bits(bitsAs<double>(old) + bitsAs<double>(b));
  const unsigned above = 64 - 8 * typeBytes(t);
  const bool less = isSigned(t) ? (int64_t)(old << above) < (int64_t)(b << above) : old < b;
  switch (op) {
    case kAnd: return old & b;
    case kOr: return old | b;
    case kXor: return old ^ b;
    case kAdd: return old + b;
    case kInc: return old >= b ? 0 : old + 1;
    case kDec: return old == 0 || old > b ? b : old - 1;
    default: return less == (op == kMin) ? old : b;
  }
}
void combine(int op, Type t, uint8_t* to, const uint8_t* from, uint32_t n, const uint8_t* other) {
  if (op < 0 || op == kExch || (op == kCas && !memcmp(to, from, n))) memcpy(to, op == kCas ? other : from, n);
  if (op < 0 || op == kExch || op == kCas) return;
  const unsigned size = typeBytes(t);
  for (uint32_t i = 0; i < n; i += size) {
    uint64_t old = 0, value = 0;
    memcpy(&old, to + i, size);
    memcpy(&value, from + i, size);
    old = atomicResult(op, t, old, value);
    memcpy(to + i, &old, size);
  }
}

namespace {

// x[3] operation; ext->refs: destinations (empty for red), refs2: b..., then c
void atomic(Warp& w, const Inst& in, uint32_t m) {
  const unsigned size = in.bytes;
  const auto &dst = in.ext->refs, &src = in.ext->refs2;
  const bool exchange = in.x[3] == kExch;
  Span s(w, in, m, size * in.vec, Kind::Atomic);
  bool changed = false;
  for (const Ref& r : src) w.needValid(in, r, m, "operand of an atomic");
  for (unsigned k = 0; k < in.vec; ++k) {
    uint32_t valid = 0;
    for (int i : lanesOf(m)) {
      auto lane = [&](Ref r) { return w.ptr<uint8_t>(r) + (unsigned)i * size; };
      uint8_t *p = s.p[i] + k * size, *v = s.tracked ? s.valid(i, k * size) : nullptr, old[16];
      memcpy(old, p, size);
      combine(in.x[3], in.type, p, lane(src[k]), size, lane(src.back()));
      changed |= memcmp(p, old, size) != 0;
      valid |= (uint32_t)allValid(v, size) << i;
      if (exchange) markValid(v, size, true);
      if (!dst.empty()) memcpy(lane(dst[k]), old, size);
    }
    if (!dst.empty()) w.setValid(dst[k], m, valid);
  }
  if (changed) w.launch->progress();
}

template <bool returns>
void decodeAtomic(Dec& d) {
  const size_t hints = takeHints(d);
  const int op = d.out.x[3];
  const Type t = d.out.type;
  if (isFloat(t) && op != kAdd && !((op == kMin || op == kMax) && typeBytes(t) <= 4 && t != Type::F32))
    d.fail("no such floating-point operation");
  const size_t at = returns, sources = op == kCas ? 2 : 1;
  d.wantArgs(at + 1 + sources, at + 1 + sources + hints);
  Extra* e = d.extra();
  if (returns)
    for (auto& o : d.elements(d.arg(0), d.out.vec)) e->refs.push_back(d.dst(o, std::max(2u, typeBytes(t))));
  d.setAddress(d.arg(at));
  for (size_t i = 1; i <= sources; ++i)
    for (auto& o : d.elements(d.arg(at + i), d.out.vec)) e->refs2.push_back(d.src(o, t));
  d.out.fn = atomic;
}

const Forms kForms = {
    {"atom", MEMORY_ORDER " (noftz) " ATOMIC_OPERATION " vector type", nullptr, decodeAtomic<true>},
    {"red", MEMORY_ORDER " (noftz) " ATOMIC_OPERATION " vector type", nullptr, decodeAtomic<false>},
};

}  // namespace
}  // namespace ptxsim
