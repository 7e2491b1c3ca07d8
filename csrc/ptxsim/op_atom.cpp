// atom and red (PTX ISA 9.7.13.4 and on). Lanes act one after another, which is one of the orders the hardware may
// take.
#include <algorithm>
#include <cmath>

#include "access.h"
#include "half.h"
#include "ops.h"
#include "race.h"

namespace ptxsim {

size_t takeMemoryModifiers(Dec& d, bool isLoad);
void decodeRedAsync(Dec&);
uint64_t atomicResult(int op, Type t, uint64_t old, uint64_t b, uint64_t c);

enum AtomOp { kAnd, kOr, kXor, kCas, kExch, kAdd, kInc, kDec, kMin, kMax };

template <class T>
static uint64_t integerResult(int op, uint64_t old64, uint64_t b64, uint64_t c64) {
  T o = (T)old64, b = (T)b64, c = (T)c64;
  using U = std::make_unsigned_t<T>;
  switch (op) {
    case kAnd: return (U)(o & b);
    case kOr: return (U)(o | b);
    case kXor: return (U)(o ^ b);
    case kCas: return (U)(o == b ? c : o);
    case kExch: return (U)b;
    case kAdd: return (U)((U)o + (U)b);
    case kInc: return (U)((U)o >= (U)b ? 0 : (U)o + 1);
    case kDec: return (U)((U)o == 0 || (U)o > (U)b ? (U)b : (U)o - 1);
    case kMin: return (U)std::min(o, b);
    default: return (U)std::max(o, b);
  }
}
static uint16_t halfResult(int op, bool bf, uint16_t a, uint16_t b) {
  float x = bf ? fromBf16(a) : fromF16(a), y = bf ? fromBf16(b) : fromF16(b);
  double r;
  if (op == kAdd)
    r = (double)x + (double)y;
  else if (x != x)
    return y != y ? 0x7fff : b;
  else if (y != y)
    return a;
  else if (x == y)
    return ((a >> 15) == 1) == (op == kMin) ? a : b;
  else
    return (x < y) == (op == kMin) ? a : b;
  return (uint16_t)narrowFromDouble(r, bf ? kBf16 : kF16);
}

uint64_t atomicResult(int op, Type t, uint64_t old, uint64_t b, uint64_t c) {
  switch (t) {
    case Type::F32: {
      float x = f32((uint32_t)old), y = f32((uint32_t)b);
      if (op == kAdd) return bits(canonical(x + y));
      return integerResult<uint32_t>(op, old, b, c);
    }
    case Type::F64:
      return op == kAdd ? bits(bitsAs<double>(old) + bitsAs<double>(b)) : integerResult<uint64_t>(op, old, b, c);
    case Type::F16: return halfResult(op, false, (uint16_t)old, (uint16_t)b);
    case Type::BF16: return halfResult(op, true, (uint16_t)old, (uint16_t)b);
    case Type::F16x2:
    case Type::BF16x2: {
      bool bf = t == Type::BF16x2;
      return halfResult(op, bf, (uint16_t)old, (uint16_t)b) |
             (uint32_t)halfResult(op, bf, (uint16_t)(old >> 16), (uint16_t)(b >> 16)) << 16;
    }
    case Type::S32: return (uint32_t)integerResult<int32_t>(op, old, b, c);
    case Type::S64: return integerResult<int64_t>(op, old, b, c);
    case Type::B16:
    case Type::U16: return integerResult<uint16_t>(op, old, b, c);
    case Type::U32:
    case Type::B32: return integerResult<uint32_t>(op, old, b, c);
    default: return integerResult<uint64_t>(op, old, b, c);
  }
}

// Names the operation; -1: none there.
int takeAtomOp(Dec& d) { return d.takeOneOf({"and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max"}); }

namespace {

// x[2] op, x[3] type, vec; ext->refs: destinations (empty for red), refs2: b..., then c
void atomic(Warp& w, const Inst& in, uint32_t m) {
  uint64_t a[kLanes];
  addresses(w, in, m, a);
  const unsigned n = in.vec, size = in.bytes;
  const auto& dst = in.ext->refs;
  const auto& src = in.ext->refs2;
  const Type t = (Type)in.x[3];
  Span s;
  bool changed = false;
  resolve(w, in, m, in.space, a, size * n, Kind::Atomic, s);
  for (unsigned k = 0; k < n; ++k) {
    uint64_t b[kLanes], c[kLanes] = {0}, old[kLanes] = {0};
    loadLanes(w, src[k], size, b);
    if (src.size() > n) loadLanes(w, src[n], size, c);
    uint32_t valid = w.validOf(src[k]) & (src.size() > n ? w.validOf(src[n]) : kAll), oldValid = 0;
    if (m & ~valid) w.needValid(in, src[k], m, "operand of an atomic");
    for (int i : lanesOf(m)) {
      uint8_t* p = s.p[i] + k * size;
      memcpy(&old[i], p, size);
      uint8_t* v = s.tracked && s.v[i] ? s.v[i] + k * size : nullptr;
      if (allValid(v, size) || in.x[2] == kExch) oldValid |= (uint32_t)allValid(v, size) << i;
      uint64_t r = atomicResult(in.x[2], t, old[i], b[i], c[i]);
      if (memcmp(p, &r, size)) {
        memcpy(p, &r, size);
        changed = true;
      }
      if (v && in.x[2] == kExch) memset(v, 1, size);
    }
    if (!dst.empty()) {
      putLanes(w, dst[k], size, old, m);
      w.setValid(dst[k], m, oldValid);
    }
  }
  if (changed) w.launch->progress();
}
struct B128 {
  uint64_t v[2];
};
void atomic128(Warp& w, const Inst& in, uint32_t m) {  // cas and exch only
  uint64_t a[kLanes];
  addresses(w, in, m, a);
  Span s;
  resolve(w, in, m, in.space, a, 16, Kind::Atomic, s);
  for (int i : lanesOf(m)) {
    B128 old, b = w.ptr<B128>(in.ext->refs2[0])[i];
    memcpy(&old, s.p[i], 16);
    bool write = in.x[2] == kExch || (old.v[0] == b.v[0] && old.v[1] == b.v[1]);
    if (in.x[2] == kCas) b = w.ptr<B128>(in.ext->refs2[1])[i];
    if (write) memcpy(s.p[i], &b, 16);
    w.ptr<B128>(in.ext->refs[0])[i] = old;
  }
  w.setValid(in.ext->refs[0], m, kAll);
  w.launch->progress();
}

void decodeAtomic(Dec& d, bool returns) {
  if (d.take("async")) {
    decodeRedAsync(d);
    return;
  }
  size_t hints = takeMemoryModifiers(d, false);
  int op = takeAtomOp(d);
  if (op < 0) d.fail("an operation is missing");
  d.take("noftz");
  if (d.has("v2") || d.has("v4") || d.has("v8")) d.out.vec = (uint8_t)(2u << d.takeOneOf({"v2", "v4", "v8"}));
  Type t = d.needType();
  d.out.x[2] = (uint8_t)op;
  d.out.x[3] = (uint8_t)t;
  d.out.bytes = (uint8_t)typeBytes(t);
  size_t at = returns ? 1 : 0;
  size_t sources = op == kCas ? 2 : 1;
  d.wantArgs(at + 1 + sources, at + 1 + sources + hints);
  Extra* e = d.extra();
  unsigned reg = std::max(2u, typeBytes(t));
  if (returns) {
    const Operand& o = d.arg(0);
    if (d.out.vec > 1)
      for (auto& x : o.sub) e->refs.push_back(d.dst(x, reg));
    else
      e->refs.push_back(d.dst(o, reg));
  }
  d.out.a = d.address(d.arg(at), &d.out.imm);
  const Operand& b = d.arg(at + 1);
  if (d.out.vec > 1)
    for (auto& x : b.sub) e->refs2.push_back(d.src(x, t));
  else
    e->refs2.push_back(d.src(b, t));
  if (op == kCas) e->refs2.push_back(d.src(at + 2, t));
  if (isFloat(t) && op != kAdd && !((op == kMin || op == kMax) && typeBytes(t) <= 4 && t != Type::F32))
    d.fail("no such floating-point operation");
  d.out.fn = t == Type::B128 ? (Handler)atomic128 : (Handler)atomic;
}

}  // namespace

void addAtomicOps(OpTable& t) {
  t["atom"] = [](Dec& d) { decodeAtomic(d, true); };
  t["red"] = [](Dec& d) { decodeAtomic(d, false); };
}

}  // namespace ptxsim
