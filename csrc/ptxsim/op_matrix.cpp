// Warp-level matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.7.14.5).
#include "access.h"
#include "half.h"
#include "ops.h"
#include "race.h"

namespace ptxsim {
namespace {

// ---- 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the row addresses of matrix i; a lane holds two neighbours
// of row lane/4.
uint32_t addressing(unsigned matrices) { return matrices == 4 ? kAll : (1u << (8 * matrices)) - 1; }
template <bool Trans>
void ldmatrix(Warp& w, const Inst& in, uint32_t) {
  uint64_t a[kLanes];
  Span s;
  addresses(w, in, addressing(in.vec), a);
  resolve(w, in, addressing(in.vec), in.space, a, 16, Kind::Read, s);
  for (unsigned j = 0; j < in.vec; ++j) {
    uint32_t* d = w.ptr<uint32_t>(in.ext->refs[j]);
    uint32_t valid = kAll;
    for (unsigned l = 0; l < kLanes; ++l) {
      uint16_t e[2];
      for (unsigned k = 0; k < 2; ++k) {
        unsigned row = Trans ? 2 * (l % 4) + k : l / 4, col = Trans ? l / 4 : 2 * (l % 4) + k;
        memcpy(&e[k], s.p[8 * j + row] + 2 * col, 2);
        if (s.v[8 * j + row] && !allValid(s.v[8 * j + row] + 2 * col, 2)) valid &= ~(1u << l);
      }
      d[l] = e[0] | (uint32_t)e[1] << 16;
    }
    w.setValid(in.ext->refs[j], kAll, valid);
  }
}
template <bool Trans>
void stmatrix(Warp& w, const Inst& in, uint32_t) {
  uint64_t a[kLanes];
  Span s;
  addresses(w, in, addressing(in.vec), a);
  place(w, in, addressing(in.vec), in.space, a, 16, Kind::Write, s);
  uint32_t changed = 0;  // rows, by the lane that addresses them
  for (unsigned j = 0; j < in.vec; ++j) {
    const uint32_t* d = w.ptr<const uint32_t>(in.ext->refs[j]);
    const uint32_t valid = w.validOf(in.ext->refs[j]);
    for (unsigned l = 0; l < kLanes; ++l)
      for (unsigned k = 0; k < 2; ++k) {
        unsigned row = Trans ? 2 * (l % 4) + k : l / 4, col = Trans ? l / 4 : 2 * (l % 4) + k;
        uint16_t e = (uint16_t)(d[l] >> (16 * k));
        if (memcmp(s.p[8 * j + row] + 2 * col, &e, 2)) changed |= 1u << (8 * j + row);
        memcpy(s.p[8 * j + row] + 2 * col, &e, 2);
        markValid(s.v[8 * j + row] ? s.v[8 * j + row] + 2 * col : nullptr, 2, (valid >> l) & 1);
      }
  }
  if (w.launch->race) raceWrites(w, in, addressing(in.vec), changed, in.space, a, 16);
  w.launch->progress();
}
void movmatrix(Warp& w, const Inst& in, uint32_t) {
  uint32_t r[kLanes], valid = 0, sv = w.validOf(in.a);
  const uint32_t* a = w.ptr<const uint32_t>(in.a);
  for (unsigned l = 0; l < kLanes; ++l) {
    r[l] = 0;
    bool ok = true;
    for (unsigned k = 0; k < 2; ++k) {
      unsigned row = 2 * (l % 4) + k, col = l / 4, from = row * 4 + col / 2;
      r[l] |= ((a[from] >> (16 * (col % 2))) & 0xffff) << (16 * k);
      ok &= (sv >> from) & 1;
    }
    valid |= (uint32_t)ok << l;
  }
  storeLanes(w, in.d, r, kAll);
  w.setValid(in.d, kAll, valid);
}
void matrixAccess(Dec& d, bool load) {
  d.take("sync");
  d.take("aligned");
  if (!d.take("m8n8")) d.fail("only .m8n8 exists on sm_90");
  int x = d.takeOneOf({"x1", "x2", "x4"});
  bool trans = d.take("trans");
  d.out.space = d.take("shared") || d.take("shared::cta") ? Space::Shared : Space::Generic;
  if (!d.take("b16") || x < 0) d.fail("a .b16 matrix count is expected");
  d.out.vec = (uint8_t)(1u << x);
  const Operand& v = d.arg(load ? 0 : 1);
  std::vector<Operand> list = v.kind == Operand::Vector ? v.sub : std::vector<Operand>{v};
  if (list.size() != d.out.vec) d.fail("wrong number of registers");
  for (auto& o : list) d.extra()->refs.push_back(load ? d.dst(o, 4) : d.src(o, Type::B32));
  d.out.a = d.address(d.arg(load ? 1 : 0), &d.out.imm);
  d.out.convergeAll = true;
  d.out.storesD = !load;
  d.out.fn = load ? (trans ? ldmatrix<true> : ldmatrix<false>) : (trans ? stmatrix<true> : stmatrix<false>);
}

// ---- mma.sync m16n8kK. With E elements per 32-bit register, g = lane/4 and q = lane%4:
//   A register r: row g + 8 (r & 1), k = E q + 4 E (r >> 1) + e        B register r: k = E q + 4 E r + e, column g
//   accumulator i (float32, int32): row g + 8 (i >> 1), column 2 q + (i & 1); float16 register r: row g + 8 r, columns
//   2 q, 2 q + 1
template <class Acc, class Get>
void mmaCore(Warp& w, const Inst& in, Get get, Acc* acc, uint32_t* valid) {
  const unsigned K = (unsigned)in.imm, E = in.vec, na = in.x[0], nb = in.x[1];
  static thread_local Acc A[16][64], B[8][64];
  uint32_t badRow = 0, badCol = 0;
  const auto& refs = in.ext->refs2;  // A registers, B registers, C registers
  for (unsigned r = 0; r < na; ++r) {
    const uint32_t* p = w.ptr<const uint32_t>(refs[r]);
    const uint32_t v = w.validOf(refs[r]);
    for (unsigned l = 0; l < kLanes; ++l) {
      unsigned row = l / 4 + 8 * (r & 1);
      if (!((v >> l) & 1)) badRow |= 1u << row;
      for (unsigned e = 0; e < E; ++e) A[row][E * (l % 4) + 4 * E * (r >> 1) + e] = get(p[l], e, true);
    }
  }
  for (unsigned r = 0; r < nb; ++r) {
    const uint32_t* p = w.ptr<const uint32_t>(refs[na + r]);
    const uint32_t v = w.validOf(refs[na + r]);
    for (unsigned l = 0; l < kLanes; ++l) {
      if (!((v >> l) & 1)) badCol |= 1u << (l / 4);
      for (unsigned e = 0; e < E; ++e) B[l / 4][E * (l % 4) + 4 * E * r + e] = get(p[l], e, false);
    }
  }
  for (unsigned l = 0; l < kLanes; ++l)
    for (unsigned i = 0; i < 4; ++i) {
      unsigned row = l / 4 + 8 * (i >> 1), col = 2 * (l % 4) + (i & 1);
      Acc s = acc[4 * l + i];
      int64_t wide = (int64_t)s;  // integers: kept exact, then wrapped or clamped
      for (unsigned k = 0; k < K; ++k) {
        if constexpr (std::is_same<Acc, float>::value)
          s = __builtin_fmaf(A[row][k], B[col][k], s);
        else
          wide += (int64_t)A[row][k] * B[col][k];
      }
      if constexpr (!std::is_same<Acc, float>::value)
        s = (Acc)(in.x[4] ? std::clamp<int64_t>(wide, INT32_MIN, INT32_MAX) : wide);
      acc[4 * l + i] = s;
      if ((badRow >> row) & 1 || (badCol >> col) & 1) valid[i] &= ~(1u << l);
    }
  ++w.launch->n.mma;
}

float element(Type t, uint32_t reg, unsigned e) {
  switch (t) {
    case Type::F16: return fromF16((uint16_t)(reg >> (16 * e)));
    case Type::BF16: return fromBf16((uint16_t)(reg >> (16 * e)));
    case Type::E4M3: return kE4m3Table[(reg >> (8 * e)) & 0xff];
    case Type::E5M2: return kE5m2Table[(reg >> (8 * e)) & 0xff];
    default: return f32(reg & 0xffffe000u);  // tf32: the low 13 bits are ignored
  }
}
// x[0], x[1] registers of A and B; x[2], x[3] their types; x[4] float16 accumulator, or .satfinite for integers;
// ext->refs D registers
void mmaFloat(Warp& w, const Inst& in, uint32_t) {
  float acc[4 * kLanes];
  uint32_t valid[4];
  const Ref* c = in.ext->refs2.data() + in.x[0] + in.x[1];
  const Type ta = (Type)in.x[2], tb = (Type)in.x[3];
  for (unsigned i = 0; i < 4; ++i) {
    Ref r = c[in.x[4] ? i / 2 : i];
    valid[i] = w.validOf(r);
    for (unsigned l = 0; l < kLanes; ++l)
      acc[4 * l + i] = in.x[4] ? fromF16((uint16_t)(lane32(w, r, l) >> (16 * (i & 1)))) : f32(lane32(w, r, l));
  }
  mmaCore<float>(w, in, [&](uint32_t v, unsigned e, bool isA) { return element(isA ? ta : tb, v, e); }, acc, valid);
  const auto& d = in.ext->refs;
  if (in.x[4]) {
    for (unsigned r = 0; r < 2; ++r) {
      for (unsigned l = 0; l < kLanes; ++l)
        w.ptr<uint32_t>(d[r])[l] = toF16(acc[4 * l + 2 * r]) | (uint32_t)toF16(acc[4 * l + 2 * r + 1]) << 16;
      w.setValid(d[r], kAll, valid[2 * r] & valid[2 * r + 1]);
    }
    return;
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned l = 0; l < kLanes; ++l) w.ptr<uint32_t>(d[i])[l] = bits(canonical(acc[4 * l + i]));
    w.setValid(d[i], kAll, valid[i]);
  }
}
void mmaInt(Warp& w, const Inst& in, uint32_t) {
  int32_t acc[4 * kLanes];
  uint32_t valid[4];
  const Ref* c = in.ext->refs2.data() + in.x[0] + in.x[1];
  for (unsigned i = 0; i < 4; ++i) {
    valid[i] = w.validOf(c[i]);
    for (unsigned l = 0; l < kLanes; ++l) acc[4 * l + i] = (int32_t)lane32(w, c[i], l);
  }
  const bool sa = (Type)in.x[2] == Type::S8, sb = (Type)in.x[3] == Type::S8;
  mmaCore<int32_t>(
      w, in,
      [&](uint32_t v, unsigned e, bool isA) -> int32_t {
        return (isA ? sa : sb) ? (int32_t)(int8_t)(v >> (8 * e)) : (int32_t)(uint8_t)(v >> (8 * e));
      },
      acc, valid);
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned l = 0; l < kLanes; ++l) w.ptr<int32_t>(in.ext->refs[i])[l] = acc[4 * l + i];
    w.setValid(in.ext->refs[i], kAll, valid[i]);
  }
}

void decodeMma(Dec& d) {
  d.take("sync");
  d.take("aligned");
  const bool saturate = d.take("satfinite");
  static const std::pair<const char*, int> kShapes[] = {
      {"m16n8k4", 4}, {"m16n8k8", 8}, {"m16n8k16", 16}, {"m16n8k32", 32}};
  unsigned K = 0;
  for (auto& s : kShapes)
    if (!K && d.take(s.first)) K = (unsigned)s.second;
  if (!K) d.fail("only m16n8k4, k8, k16 and k32 are supported");
  if (!d.take("row") || !d.take("col")) d.fail("A must be row-major and B column-major");
  Type td = d.needType(), ta = d.needType(), tb = d.needType(), tc = d.needType();
  unsigned bits = ta == Type::TF32 ? 32 : ta == Type::F16 || ta == Type::BF16 ? 16 : 8;
  bool integer = ta == Type::S8 || ta == Type::U8;
  if (!integer && ta != Type::F16 && ta != Type::BF16 && ta != Type::TF32 && ta != Type::E4M3 && ta != Type::E5M2)
    d.fail("operand type is not supported");
  if (td != tc || (bits != 8 && ta != tb)) d.fail("this mix of types is not supported");
  if (integer ? td != Type::S32 : (td != Type::F32 && td != Type::F16))
    d.fail("this accumulator type is not supported");
  const unsigned E = 32 / bits, na = 16 * K / (32 * E), nb = 8 * K / (32 * E), nc = td == Type::F16 ? 2 : 4;
  if (!na || !nb || (bits == 8 && K < 16) || (bits == 16 && K != 8 && K != 16) || (bits == 32 && K > 8))
    d.fail("no such shape");
  d.wantArgs(4, 4);
  auto list = [&](const Operand& o, unsigned n) {
    if (o.kind != Operand::Vector || o.sub.size() != n) d.fail("wrong number of registers: ", n, " are expected");
    return o.sub;
  };
  Extra* e = d.extra();
  for (auto& o : list(d.arg(0), nc)) e->refs.push_back(d.dst(o, 4));
  for (auto& o : list(d.arg(1), na)) e->refs2.push_back(d.src(o, Type::B32));
  for (auto& o : list(d.arg(2), nb)) e->refs2.push_back(d.src(o, Type::B32));
  for (auto& o : list(d.arg(3), nc)) e->refs2.push_back(d.src(o, td == Type::F32 ? Type::F32 : Type::B32));
  d.out.imm = K;
  d.out.vec = (uint8_t)E;
  d.out.x[0] = (uint8_t)na;
  d.out.x[1] = (uint8_t)nb;
  d.out.x[2] = (uint8_t)ta;
  d.out.x[3] = (uint8_t)tb;
  d.out.x[4] = integer ? saturate : td == Type::F16;
  d.out.convergeAll = true;
  d.out.fn = integer ? (Handler)mmaInt : (Handler)mmaFloat;
}

}  // namespace

void addMatrixOps(OpTable& t) {
  t["ldmatrix"] = [](Dec& d) { matrixAccess(d, true); };
  t["stmatrix"] = [](Dec& d) { matrixAccess(d, false); };
  t["movmatrix"] = [](Dec& d) {
    for (auto m : {"sync", "aligned", "m8n8", "trans", "b16"}) d.take(m);
    d.wantArgs(2, 2);
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, Type::B32);
    d.out.convergeAll = true;
    d.out.fn = movmatrix;
  };
  t["mma"] = decodeMma;
}

}  // namespace ptxsim
