// wgmma (PTX ISA 9.7.15). One operation of a warpgroup: it starts when all four warps have issued it, each of which has
// 16 of the rows, and is over for all of them at once. The four are checked to issue the same sequence.
#include <algorithm>
#include <cmath>

#include "async.h"
#include "half.h"

namespace ptxsim {
namespace {

// A shared-memory matrix as a descriptor gives it. `mn` counts rows of A or columns of B, k the other direction.
struct Descriptor {
  uint32_t start, lbo, sbo, base;
  unsigned mode;  // 0 none, 1 128 bytes, 2 64, 3 32
  explicit Descriptor(uint64_t d)
      : start((uint32_t)(d & 0x3fff) << 4),
        lbo((uint32_t)(d >> 16 & 0x3fff) << 4),
        sbo((uint32_t)(d >> 32 & 0x3fff) << 4),
        base((uint32_t)(d >> 49 & 7)),
        mode((unsigned)(d >> 62)) {}
  unsigned shift() const { return mode ? 4 - mode : 0; }  // bits of the XOR
  uint32_t span() const { return 16u << shift(); }
  // Offset in the CTA's window of the 16-byte chunk that holds byte `c` (a multiple of 16) along the contiguous
  // direction at index r of the other.
  uint32_t chunk(bool mnMajor, uint32_t c, uint32_t r) const {
    const uint32_t w = span();
    uint32_t a;
    if (!mnMajor)
      a = r % 8 * w + r / 8 * sbo + (mode ? c : c / 16 * lbo);
    else if (mode)
      a = r % 8 * w + c % w + c / w * lbo + r / 8 * sbo;
    else
      a = r % 8 * 16 + c / 16 * sbo + r / 8 * lbo;
    a = (start + a) & 0x3ffff;
    return a ^ ((((a >> 7) - base) & ((1u << shift()) - 1)) << 4);
  }
};

struct Shape {
  unsigned n = 0, k = 0;
  Type a = Type::None, b = Type::None, d = Type::None;
  bool registersA = false, transA = false, transB = false, saturate = false;
  int scaleA = 1, scaleB = 1;
};

inline float value(Type t, const uint8_t* p) {
  uint16_t h;
  uint32_t u;
  switch (t) {
    case Type::E4M3: return kE4m3Table[*p];
    case Type::E5M2: return kE5m2Table[*p];
    case Type::S8: return (float)(int8_t)*p;
    case Type::U8: return (float)*p;
    case Type::BF16: memcpy(&h, p, 2); return fromBf16(h);
    case Type::F16: memcpy(&h, p, 2); return fromF16(h);
    default: memcpy(&u, p, 4); return f32(u & 0xffffe000u);
  }
}

struct Part : AsyncOp {  // a warp's share, for its commit groups
  const Shape* s = nullptr;
  uint32_t aValid[4] = {kAll, kAll, kAll, kAll};
  bool step() override { return done; }
};

struct Wgmma : AsyncOp {
  const Shape* s = nullptr;
  uint64_t descA = 0, descB = 0;
  bool accumulate = true;
  std::vector<std::shared_ptr<Part>> parts;
  std::shared_ptr<RaceClock> clock;  // of the warps that have issued it, when they did

  // rows [first, first + count) of the operand as floats, out[index * kpitch + k] or transposed
  void fetch(const Descriptor& d, bool mnMajor, Type t, unsigned first, unsigned count, float* out, unsigned pitch,
             bool kFirst, std::vector<bool>* bad) {
    Cta& cta = *warp->cta;
    const unsigned es = typeBytes(t), per = 16 / es, K = s->k;
    const unsigned outer = mnMajor ? K : count, inner = (mnMajor ? count : K * 1u) / per;
    for (unsigned r = 0; r < outer; ++r)
      for (unsigned ci = 0; ci < std::max(1u, inner); ++ci) {
        const uint32_t c = (mnMajor ? first * es : 0) + ci * 16;
        const uint32_t off = d.chunk(mnMajor, c, mnMajor ? r : first + r);
        if (off < kSharedReserved || off + 16 > cta.smemBytes) {
          char text[128];
          snprintf(text, sizeof text,
                   "a wgmma descriptor (start 0x%x, LBO %u, SBO %u) reaches shared offset 0x%x of 0x%x", d.start, d.lbo,
                   d.sbo, off, cta.smemBytes);
          warp->fail(*inst, -1, text);
        }
        raceAsyncShared(*this, cta, off, 16, Kind::Read);
        const bool good = allValid(cta.smemValid + off, 16);
        const unsigned elements = mnMajor ? std::min(per, count - ci * per) : per;
        for (unsigned e = 0; e < elements; ++e) {
          const unsigned mn = mnMajor ? ci * per + e : r, k = mnMajor ? r : ci * per + e;
          out[kFirst ? k * pitch + mn : mn * pitch + k] = value(t, cta.smem + off + e * es);
          if (!good && !allValid(cta.smemValid + off + e * es, es)) (*bad)[mn] = true;
        }
      }
  }

  // What one tensor copy brought must be read as a regular part of the tensor: a wrong stride or swizzle reads bytes
  // that are there, but not these. Between copies nothing is said: pages of a cache may lie anywhere.
  // The result says where it is not; `known`: all of it came from tensor copies.
  std::string irregular(const Descriptor& d, bool mnMajor, Type t, unsigned first, unsigned count, bool* known) {
    Cta& cta = *warp->cta;
    const unsigned es = typeBytes(t), outer = mnMajor ? s->k : count;
    const unsigned inner = std::max(1u, (mnMajor ? count : s->k) * es / 16);
    auto offset = [&](unsigned r, unsigned c) {
      return d.chunk(mnMajor, (mnMajor ? first * es : 0) + c * 16, mnMajor ? r : first + r);
    };
    auto at = [&](unsigned r, unsigned c) -> const Provenance* {
      const uint32_t off = offset(r, c);
      return off + 16 <= cta.smemBytes ? raceTagOf(cta, off) : nullptr;
    };
    std::vector<bool> taken(1 << 14);  // by 16 bytes of the window that a descriptor reaches
    for (unsigned r = 0; r < outer; ++r)
      for (unsigned c = 0; c < inner; ++c) {
        const uint32_t chunk = offset(r, c) / 16;
        if (taken[chunk]) return cat("the 16 bytes at shared offset ", 16 * chunk, " are read twice");
        taken[chunk] = true;
      }
    // A chunk is 16 bytes on from its left neighbour, and a row as far from the one above as the first two rows are.
    const Provenance *row0 = at(0, 0), *row1 = outer > 1 ? at(1, 0) : nullptr;
    *known = row0 && row1 && row0->op == row1->op;
    if (!*known) return "";
    const uint64_t pitch = row1->address - row0->address;
    const Provenance* origin = nullptr;
    unsigned originRow = 0, originChunk = 0;
    for (unsigned r = 0; r < outer; ++r)
      for (unsigned c = 0; c < inner; ++c) {
        const Provenance* p = at(r, c);
        *known &= p != nullptr;
        if (!p) return "";
        if (!origin || p->op != origin->op) {
          origin = p, originRow = r, originChunk = c;
          continue;
        }
        const uint64_t want =
            origin->address + (uint64_t)((int64_t)r - originRow) * pitch + (uint64_t)(((int64_t)c - originChunk) * 16);
        if (p->address != want)
          return (mnMajor ? "k " : "row ") + std::to_string(first + r) + ", 16-byte chunk " + std::to_string(c) +
                 " was loaded from " + std::to_string((int64_t)(p->address - want)) +
                 " bytes past where its neighbours put it";
      }
    return "";
  }
  void checkOperand(const Descriptor& d, bool mnMajor, Type t, unsigned first, unsigned count, const char* name) {
    bool known;
    const std::string what = irregular(d, mnMajor, t, first, count, &known);
    if (what.empty()) return;
    std::string hint;
    auto tryOut = [&](Descriptor other, const std::string& change) {
      if (hint.empty() && irregular(other, mnMajor, t, first, count, &known).empty() && known)
        hint = "; with " + change + " it would be";
    };
    Descriptor other = d;
    std::swap(other.lbo, other.sbo);
    tryOut(other, "LBO and SBO swapped");
    other = d, other.sbo = 8 * d.span();
    tryOut(other, "SBO " + std::to_string(other.sbo));
    for (unsigned mode = 0; mode < 4; ++mode) {
      other = d, other.mode = mode;
      tryOut(other, "swizzle mode " + std::to_string(mode));
    }
    warp->fail(*inst, -1, "operand ", name, " of a wgmma is no regular part of the tensor it was loaded from: ", what,
               " (descriptor: start ", d.start, ", LBO ", d.lbo, ", SBO ", d.sbo, ", swizzle mode ", d.mode, hint, ")");
  }

  bool step() override {
    static thread_local std::vector<float> B(64 * 256);
    std::vector<bool> badCol(s->n, false);
    if (warp->launch->race) {
      if (!s->registersA) checkOperand(Descriptor(descA), s->transA, s->a, 0, 64, "A");
      checkOperand(Descriptor(descB), s->transB, s->b, 0, s->n, "B");
    }
    fetch(Descriptor(descB), s->transB, s->b, 0, s->n, B.data(), 256, true, &badCol);
    for (auto& part : parts) {
      rows(*part, B, badCol);
      part->done = part->readDone = true;
    }
    return readDone = true;
  }
  void rows(const Part& part, const std::vector<float>& B, const std::vector<bool>& badCol) {
    Warp& w = *part.warp;
    const Inst& in = *inst;
    const unsigned N = s->n, K = s->k, row0 = 16 * (w.index % 4);
    static thread_local std::vector<float> A(16 * 64), C(16 * 256);
    std::vector<bool> badRow(16, false);
    const auto& refs = in.ext->refs;
    const auto& sources = in.ext->refs2;
    if (s->registersA) {
      const unsigned es = typeBytes(s->a), E = 4 / es;
      for (unsigned r = 0; r < 4; ++r) {
        const uint32_t* p = w.ptr<const uint32_t>(sources[r]);
        const uint32_t v = part.aValid[r];
        for (unsigned l = 0; l < kLanes; ++l)
          for (unsigned e = 0; e < E; ++e) {
            const unsigned row = l / 4 + 8 * (r & 1), k = E * (l % 4) + 4 * E * (r >> 1) + e;
            uint32_t x = p[l] >> (8 * es * e == 32 ? 0 : 8 * es * e);
            A[row * 64 + k] = value(s->a, reinterpret_cast<const uint8_t*>(&x));
            if (!((v >> l) & 1)) badRow[row] = true;
          }
      }
    } else {
      fetch(Descriptor(descA), s->transA, s->a, row0, 16, A.data(), 64, false, &badRow);
    }
    const float sign = (float)(s->scaleA * s->scaleB);
    if (sign != 1)
      for (unsigned i = 0; i < 16; ++i)
        for (unsigned k = 0; k < K; ++k) A[i * 64 + k] *= sign;
    const bool half = s->d == Type::F16, integer = s->d == Type::S32;
    auto reg = [&](unsigned row, unsigned col) {
      return half ? (col / 8) * 2 + row / 8 : (col / 8) * 4 + (row / 8) * 2 + (col & 1);
    };
    auto lane = [](unsigned row, unsigned col) { return (row % 8) * 4 + (col % 8) / 2; };
    if (integer) {
      std::vector<int32_t> sums(N);
      for (unsigned i = 0; i < 16; ++i)
        for (unsigned j = 0; j < N; ++j) {
          int64_t sum = accumulate ? w.ptr<int32_t>(refs[reg(i, j)])[lane(i, j)] : 0;
          for (unsigned k = 0; k < K; ++k) sum += (int64_t)A[i * 64 + k] * (int64_t)B[k * 256 + j];
          w.ptr<int32_t>(refs[reg(i, j)])[lane(i, j)] =
              s->saturate ? (int32_t)std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX) : (int32_t)sum;
        }
    } else {
      for (unsigned i = 0; i < 16; ++i) {
        float* c = &C[i * 256];
        if (!accumulate)
          std::fill(c, c + N, 0.0f);
        else
          for (unsigned j = 0; j < N; ++j) {
            uint32_t v = w.ptr<const uint32_t>(refs[reg(i, j)])[lane(i, j)];
            c[j] = half ? fromF16((uint16_t)(v >> (16 * (j & 1)))) : f32(v);
          }
        if (typeBytes(s->a) == 1 && w.launch->opt.fp8Truncate) {
          for (unsigned j = 0; j < N; ++j) c[j] = truncated(&A[i * 64], &B[j], K, c[j]);
        } else {
          for (unsigned k = 0; k < K; ++k) {
            const float a = A[i * 64 + k];
            const float* b = &B[k * 256];
            for (unsigned j = 0; j < N; ++j) c[j] = __builtin_fmaf(a, b[j], c[j]);
          }
        }
        for (unsigned j = 0; j < N; ++j) {
          uint32_t& v = w.ptr<uint32_t>(refs[reg(i, j)])[lane(i, j)];
          if (half)
            v = (v & (0xffff0000u >> (16 * (j & 1)))) | (uint32_t)toF16(c[j]) << (16 * (j & 1));
          else
            v = bits(canonical(c[j]));
        }
      }
    }
    bool anyBad = std::find(badRow.begin(), badRow.end(), true) != badRow.end() ||
                  std::find(badCol.begin(), badCol.end(), true) != badCol.end();
    uint32_t resultValid[128];
    for (size_t r = 0; r < refs.size(); ++r) {
      resultValid[r] = accumulate ? w.valid[refs[r].id] : kAll;
    }
    if (anyBad)
      for (unsigned i = 0; i < 16; ++i)
        for (unsigned j = 0; j < N; ++j)
          if (badRow[i] || badCol[j]) resultValid[reg(i, j)] &= ~(1u << lane(i, j));
    for (size_t r = 0; r < refs.size(); ++r) w.valid[refs[r].id] = resultValid[r];
  }
  // The fp8 tensor core of sm_90 aligns all addends to the largest and keeps about 14 bits of each.
  static float truncated(const float* a, const float* b, unsigned K, float c) {
    int top = c == 0 ? -1000 : std::ilogb(c);
    for (unsigned k = 0; k < K; ++k)
      if (float p = a[k] * b[k * 256]; p != 0) top = std::max(top, std::ilogb(p));
    if (top < -900) return c;
    double unit = std::ldexp(1.0, top - 13), sum = std::trunc(c / unit);
    for (unsigned k = 0; k < K; ++k) sum += std::trunc((double)a[k] * b[k * 256] / unit);
    return (float)(sum * unit);
  }
};

void mmaAsync(Warp& w, const Inst& in, uint32_t m) {
  const Shape& s = *reinterpret_cast<const Shape*>(in.imm);
  auto uniform = [&](Ref r, const char* what) {
    w.needValid(in, r, m, what);
    const uint64_t v = lane64(w, r, 0);
    for (unsigned i = 1; i < kLanes; ++i)
      if (lane64(w, r, i) != v) w.fail(in, (int)i, what, " differs between lanes");
    return v;
  };
  const uint64_t descA = s.registersA ? 0 : uniform(in.a, "wgmma descriptor"),
                 descB = uniform(in.b, "wgmma descriptor");
  w.needValid(in, in.c, m, "wgmma scale-d");
  const uint32_t p = w.pred(in.c) ^ (in.x[0] ? kAll : 0);
  if (p != 0 && p != kAll) w.fail(in, firstLane(m), "wgmma scale-d differs between lanes");
  if (w.launch->threads % 128 && w.index / 4 == w.launch->warpsPerCta / 4)
    w.fail(in, -1, "a wgmma in an incomplete warpgroup");

  // The first warp to get here makes the operation, the others find it.
  Cta::WgmmaOrder& order = w.cta->wgmma[w.index / 4];
  const uint64_t at = w.wgmmaCount++ - order.base;
  if (at == order.issued.size()) {
    auto op = std::make_shared<Wgmma>();
    op->s = &s, op->inst = &in;
    op->descA = descA, op->descB = descB, op->accumulate = p != 0;
    if (!order.issued.empty()) op->after.push_back(order.issued.back());
    order.issued.push_back(op);
  }
  auto op = std::static_pointer_cast<Wgmma>(order.issued[at]);
  if (op->inst != &in || op->descA != descA || op->descB != descB || op->accumulate != (p != 0))
    w.fail(in, -1, "the warps of a warpgroup issue different wgmma (instruction, descriptor or scale-d)");
  auto part = std::make_shared<Part>();
  part->s = &s;

  for (auto* list : {&in.ext->refs, &in.ext->refs2})
    for (const Ref& r : *list)
      if (w.unfenced[r.id] && w.launch->opt.detect)
        w.fail(in, -1, list == &in.ext->refs ? "an accumulator" : "an A register",
               " of a wgmma has been written since the last wgmma.fence");
  for (const Ref& r : in.ext->refs) {
    uint8_t& f = w.inflight[r.id];
    if (f == 0) f = 1, ++w.numInflight;
  }
  if (s.registersA)
    for (unsigned r = 0; r < 4; ++r) {
      uint8_t& f = w.inflight[in.ext->refs2[r].id];
      if (f == 1) w.fail(in, -1, "the A registers of a wgmma are accumulators of one that has not been waited for");
      if (f == 0 && in.ext->refs2[r].id) f = 2, ++w.numInflight;
      part->aValid[r] = w.validOf(in.ext->refs2[r]);
    }
  track(w, in, m, part, &w.wgmma);
  raceJoin(w, op->clock);
  op->parts.push_back(part);
  ++w.launch->n.wgmma;
  if (op->parts.size() < 4) return;
  w.launch->n.wgmmaCycles += s.n / 2;
  op->cluster = w.cta->cluster;
  op->warp = &w;
  raceIssueAt(*op, op->clock);
  for (auto& x : op->parts) x->id = op->id;
  while (!order.issued.empty() && order.issued.front()->id && order.issued.size() > 1)
    order.issued.pop_front(), ++order.base;
  w.launch->issue(op);
}
void commit(Warp& w, const Inst&, uint32_t m) { commitGroups(w.wgmma, m); }
void waitGroup(Warp& w, const Inst& in, uint32_t m) {
  if (!waitGroups(w, w.wgmma, m, (uint32_t)in.imm, false, false)) return;
  // What is still in flight keeps its registers; the rest is free.
  std::fill(w.inflight.begin(), w.inflight.end(), 0);
  w.numInflight = 0;
  for (auto& op : w.wgmma.ops) {
    const auto& e = *op->inst->ext;
    for (auto& r : e.refs)
      if (!w.inflight[r.id]) w.inflight[r.id] = 1, ++w.numInflight;
    if (static_cast<Part*>(op.get())->s->registersA)
      for (unsigned r = 0; r < 4; ++r)
        if (e.refs2[r].id && !w.inflight[e.refs2[r].id]) w.inflight[e.refs2[r].id] = 2, ++w.numInflight;
  }
}
void fence(Warp& w, const Inst&, uint32_t) { std::fill(w.unfenced.begin(), w.unfenced.end(), 0); }

void decodeWgmma(Dec& d) {
  d.out.convergeAll = true;
  d.out.isWgmma = true;
  if (d.take("fence")) {
    d.take("sync");
    d.take("aligned");
    d.out.fn = fence;
    return;
  }
  if (d.take("commit_group")) {
    d.take("sync");
    d.take("aligned");
    d.out.fn = commit;
    return;
  }
  if (d.take("wait_group")) {
    d.take("sync");
    d.take("aligned");
    d.out.imm = d.intArg(0);
    d.out.fn = waitGroup;
    return;
  }
  if (!d.take("mma_async")) d.fail("unknown operation");
  d.take("sync");
  d.take("aligned");
  auto owned = std::make_shared<Shape>();
  Shape& s = *owned;
  for (size_t i = 1; i < d.p.op.size(); ++i)
    if (!d.used[i] && d.p.op[i].compare(0, 4, "m64n") == 0) {
      d.used[i] = true;
      if (sscanf(d.p.op[i].c_str(), "m64n%uk%u", &s.n, &s.k) != 2) d.fail("bad shape");
    }
  s.saturate = d.take("satfinite");
  s.d = d.needType();
  s.a = d.needType();
  s.b = d.needType();
  const unsigned es = typeBytes(s.a);
  const bool integer = s.a == Type::S8 || s.a == Type::U8, half = s.a == Type::F16 || s.a == Type::BF16,
             fp8 = s.a == Type::E4M3 || s.a == Type::E5M2;
  if (!integer && !half && !fp8 && s.a != Type::TF32) d.fail("operand type is not supported");
  if (s.n < 8 || s.n > 256 || s.n % 8 || s.k * es != 32 || typeBytes(s.b) != es) d.fail("no such shape");
  if (integer ? s.d != Type::S32 : s.d != Type::F32 && !(s.d == Type::F16 && (s.a == Type::F16 || fp8)))
    d.fail("no such accumulator type");
  if ((half || s.a == Type::TF32) && s.a != s.b) d.fail("A and B must have one type");
  const unsigned nd = s.d == Type::F16 ? s.n / 4 : s.n / 2;
  s.registersA = d.arg(1).kind == Operand::Vector;
  const size_t tail = integer ? 0 : half ? (s.registersA ? 3 : 4) : 2;
  d.wantArgs(4 + tail, 4 + tail);
  const Operand& acc = d.arg(0);
  if (acc.kind != Operand::Vector || acc.sub.size() != nd) d.fail(nd, " accumulator registers are expected");
  Extra* e = d.extra();
  for (auto& o : acc.sub) e->refs.push_back(d.dst(o, 4));
  if (s.registersA) {
    if (d.arg(1).sub.size() != 4) d.fail("4 registers of A are expected");
    for (auto& o : d.arg(1).sub) e->refs2.push_back(d.src(o, Type::B32));
  } else {
    d.out.a = d.src(1, Type::B64);
  }
  d.out.b = d.src(2, Type::B64);
  bool neg;
  d.out.c = d.pred(d.arg(3), &neg);
  d.out.x[0] = neg;
  if (!integer) {
    s.scaleA = (int)d.intArg(4);
    s.scaleB = (int)d.intArg(5);
    if (std::abs(s.scaleA) != 1 || std::abs(s.scaleB) != 1) d.fail("scale-a and scale-b must be 1 or -1");
  }
  if (half) {
    size_t at = 6;
    if (!s.registersA) s.transA = d.intArg(at++) != 0;
    s.transB = d.intArg(at) != 0;
  }
  d.kb.k.owned.push_back(owned);
  d.out.imm = (int64_t)&s;
  d.out.fn = mmaAsync;
}

}  // namespace

void addWgmmaOps(OpTable& t) { t["wgmma"] = decodeWgmma; }

}  // namespace ptxsim
