// wgmma (PTX ISA 9.7.15). One operation of a warpgroup: it starts when all four warps have issued it, each of which has
// 16 of the rows, and is over for all of them at once. The four are checked to issue the same sequence.
#include "async.h"
#include "matrix.h"

namespace ptxsim {
namespace {

// `count` rows of A, or columns of B, from `first` on, by their descriptor. `mn` counts these, k the other direction.
struct SharedMatrix {
  uint64_t descriptor;
  bool mnMajor;  // the contiguous direction
  Type type;
  unsigned first, count, k, es = typeBytes(type);
  uint32_t start = field(0, 14) << 4, lbo = field(16, 14) << 4, sbo = field(32, 14) << 4, base = field(49, 3);
  unsigned mode = field(62, 2);  // 0 none, 1 128 bytes, 2 64, 3 32
  uint32_t field(int at, int n) const { return (uint32_t)(descriptor >> at & ((1u << n) - 1)); }
  unsigned shift() const { return mode ? 4 - mode : 0; }  // bits of the XOR
  uint32_t span() const { return 16u << shift(); }
  unsigned outer() const { return mnMajor ? k : count; }
  unsigned chunks() const { return (mnMajor ? count : k) * es / 16; }  // of 16 bytes, along the contiguous direction
  uint32_t offset(unsigned r, unsigned c) const {  // in the CTA's window, of chunk c at index r of the other direction
    if (mnMajor)
      c += first * es / 16;
    else
      r += first;
    const uint32_t low = (1u << shift()) - 1;
    const bool exchanged = mnMajor && !mode;  // LBO and SBO
    uint32_t a = start + ((r % 8 << shift()) + (c & low)) * 16;
    a += (c >> shift()) * (exchanged ? sbo : lbo) + r / 8 * (exchanged ? lbo : sbo);
    a &= 0x3ffff;
    return a ^ ((((a >> 7) - base) & low) << 4);
  }

  // What one tensor copy brought must be read as a regular part of the tensor: a wrong stride or swizzle reads bytes
  // that are there, but not these. Between copies nothing is said: pages of a cache may lie anywhere.
  // The result says where it is not; `known`: all of it came from tensor copies.
  std::string irregular(Cta& cta, bool* known) const {
    std::vector<bool> taken(1 << 14);  // by 16 bytes of the window that a descriptor reaches
    auto at = [&](unsigned r, unsigned c) {
      const uint32_t off = offset(r, c);
      return off + 16 <= cta.smemBytes ? raceTag(cta, off) : Provenance();
    };
    for (unsigned r = 0; r < outer(); ++r)
      for (unsigned c = 0; c < chunks(); ++c) {
        const uint32_t chunk = offset(r, c) / 16;
        if (taken[chunk]) return cat("the 16 bytes at shared offset ", 16 * chunk, " are read twice");
        taken[chunk] = true;
      }
    // A chunk is 16 bytes on from its left neighbour, and a row as far from the one above as the first two rows are.
    Provenance origin = at(0, 0);
    const Provenance row1 = at(1, 0);
    *known = origin.op && row1.op == origin.op;
    if (!*known) return "";
    const uint64_t pitch = row1.address - origin.address;
    unsigned originRow = 0, originChunk = 0;
    for (unsigned r = 0; r < outer(); ++r)
      for (unsigned c = 0; c < chunks(); ++c) {
        const Provenance p = at(r, c);
        *known = p.op != 0;
        if (!*known) return "";
        if (p.op != origin.op) origin = p, originRow = r, originChunk = c;
        const uint64_t want = origin.address + (r - originRow) * pitch + (uint64_t)((int64_t)c - originChunk) * 16;
        if (p.address != want)
          return cat(mnMajor ? "k " : "row ", first + r, ", 16-byte chunk ", c, " was loaded from ",
                     (int64_t)(p.address - want), " bytes past where its neighbours put it");
      }
    return "";
  }
};

struct Shape : MatrixShape {
  bool registersA = false, transA = false, transB = false;
  int sign = 1;
};

struct Part : AsyncOp {  // a warp's share, for its commit groups
  bool step() override { return done; }
};

struct Wgmma : AsyncOp {
  const Shape* s = nullptr;
  uint64_t descA = 0, descB = 0;
  bool accumulate = true;
  std::vector<std::shared_ptr<Part>> parts;

  SharedMatrix a(unsigned first, unsigned count) const { return {descA, s->transA, s->a, first, count, s->k}; }
  SharedMatrix b() const { return {descB, s->transB, s->b, 0, s->n, s->k}; }

  // The operand as floats, out[index * mnPitch + k * kPitch].
  void fetch(const SharedMatrix& x, float* out, unsigned mnPitch, unsigned kPitch, MatrixOperands::Bad& bad) {
    Cta& cta = *warp->cta;
    const unsigned es = x.es, per = 16 / es;
    for (unsigned r = 0; r < x.outer(); ++r)
      for (unsigned c = 0; c < x.chunks(); ++c) {
        const uint32_t off = x.offset(r, c);
        if (off < kSharedReserved || off + 16 > cta.smemBytes)
          warp->fail(*inst, -1, "a wgmma descriptor (start ", hex(x.start), ", LBO ", x.lbo, ", SBO ", x.sbo,
                     ") reaches shared offset ", hex(off), " of ", hex(cta.smemBytes));
        const Place chunk = placeIn(cta, off);
        raceAsync(*this, chunk, 16, Kind::Read);
        const bool good = allValid(chunk.valid, 16);
        for (unsigned e = 0; e < per; ++e) {
          const unsigned mn = x.mnMajor ? c * per + e : r, k = x.mnMajor ? r : c * per + e;
          out[mn * mnPitch + k * kPitch] = matrixElement(x.type, chunk.p + e * es);
          if (!good && !allValid(chunk.valid + e * es, es)) bad.set(mn);
        }
      }
  }
  void checkOperand(const SharedMatrix& x, const char* name) {
    bool known;
    const std::string what = x.irregular(*warp->cta, &known);
    if (what.empty()) return;
    std::string hint;
    auto tryOut = [&](const std::string& change, auto alter) {
      SharedMatrix other = x;
      alter(other);
      if (hint.empty() && other.irregular(*warp->cta, &known).empty() && known)
        hint = "; with " + change + " it would be";
    };
    tryOut("LBO and SBO swapped", [](SharedMatrix& y) { std::swap(y.lbo, y.sbo); });
    tryOut(cat("SBO ", 8 * x.span()), [](SharedMatrix& y) { y.sbo = 8 * y.span(); });
    for (unsigned mode = 0; mode < 4; ++mode)
      tryOut(cat("swizzle mode ", mode), [&](SharedMatrix& y) { y.mode = mode; });
    warp->fail(*inst, -1, "operand ", name, " of a wgmma is no regular part of the tensor it was loaded from: ", what,
               " (descriptor: start ", x.start, ", LBO ", x.lbo, ", SBO ", x.sbo, ", swizzle mode ", x.mode, hint, ")");
  }

  bool step() override {
    MatrixOperands m;
    const auto &acc = inst->ext->refs, &registers = inst->ext->refs2;
    if (warp->launch->race) {
      if (!s->registersA) checkOperand(a(0, 64), "A");
      checkOperand(b(), "B");
    }
    fetch(b(), m.B[0], 1, MatrixOperands::kMaxN, m.badCol);
    for (auto& part : parts) {
      m.badRow.reset();
      if (s->registersA)
        operandFromRegisters(*part->warp, registers.data(), 4, s->a, true, m);
      else
        fetch(a(16 * (part->warp->index % 4), 16), m.A[0], MatrixOperands::kMaxK, 1, m.badRow);
      if (s->sign < 0)
        for (auto& row : m.A)
          for (unsigned k = 0; k < s->k; ++k) row[k] = -row[k];
      multiplyMatrices(*part->warp, *s, m, accumulate ? acc.data() : nullptr, acc.data());
      part->done = part->readDone = true;
    }
    return readDone = true;
  }
};

// Marks the registers of a wgmma in flight.
void hold(Warp& w, const Inst& in) {
  for (auto* refs : {&in.ext->refs, &in.ext->refs2})
    for (const Ref& r : *refs)
      if (r.id && !w.inflight[r.id]) w.inflight[r.id] = refs == &in.ext->refs ? 1 : 2, ++w.numInflight;
}

void mmaAsync(Warp& w, const Inst& in, uint32_t m) {
  const auto& s = owned<Shape>(in);
  auto uniform = [&](Ref r) {
    w.needValid(in, r, m, "wgmma descriptor");
    for (unsigned i = 1; i < kLanes; ++i)
      if (lane64(w, r, i) != lane64(w, r, 0)) w.fail(in, (int)i, "wgmma descriptor differs between lanes");
    return lane64(w, r, 0);
  };
  const uint64_t descA = s.registersA ? 0 : uniform(in.a), descB = uniform(in.b);
  w.needValid(in, in.c, m, "wgmma scale-d");
  const uint32_t p = w.predicate(in.c);
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
  const auto &acc = in.ext->refs, &registers = in.ext->refs2;
  for (auto* list : {&acc, &registers})
    for (const Ref& r : *list)
      if (w.unfenced[r.id] && w.launch->opt.detect)
        w.fail(in, -1, list == &acc ? "an accumulator" : "an A register",
               " of a wgmma has been written since the last wgmma.fence");
  hold(w, in);
  auto part = std::make_shared<Part>();
  for (const Ref& r : registers)
    if (w.inflight[r.id] == 1)
      w.fail(in, -1, "the A registers of a wgmma are accumulators of one that has not been waited for");
  track(w, in, m, part, &w.wgmma);
  raceRelease(w, op->clock);
  op->parts.push_back(part);
  ++w.launch->n.wgmma;
  if (op->parts.size() < 4) return;
  w.launch->n.wgmmaCycles += s.n / 2;
  track(w, in, m, op, nullptr);
  raceIssue(*op);
  for (auto& x : op->parts) x->id = op->id;
  for (; order.issued.size() > 1 && order.issued.front()->id; ++order.base) order.issued.pop_front();
  w.launch->issue(op);
}
void waitGroup(Warp& w, const Inst& in, uint32_t m) {
  if (!waitGroups(w, w.wgmma, m, (uint32_t)in.imm, false, false)) return;
  // What is still in flight keeps its registers; the rest is free.
  std::fill(w.inflight.begin(), w.inflight.end(), 0);
  w.numInflight = 0;
  for (auto& op : w.wgmma.ops) hold(w, *op->inst);
}
void fence(Warp& w, const Inst&, uint32_t) { std::fill(w.unfenced.begin(), w.unfenced.end(), 0); }

void decodeWgmma(Dec& d) {
  d.out.isWgmma = true;
  auto& s = own<Shape>(d);
  s.async = true;
  s.saturate = d.out.x[0];
  for (size_t i = 1; i < d.used.size(); ++i)
    if (!d.used[i] && sscanf(d.p.op[i].c_str(), "m64n%uk%u", &s.n, &s.k) == 2) d.used[i] = true;
  matrixTypes(d, s);
  if (s.n < 8 || s.n > 256 || s.n % 8 || s.k * typeBytes(s.a) != 32) d.fail("no such shape");
  s.registersA = d.arg(1).kind == Operand::Vector;
  const size_t tail = s.integer() ? 0 : s.half() ? (s.registersA ? 3 : 4) : 2;
  d.wantArgs(4 + tail);
  Extra* e = d.extra();
  for (auto& o : d.elements(d.arg(0), s.accumulators())) e->refs.push_back(d.dst(o, 4));
  if (s.registersA)
    for (auto& o : d.elements(d.arg(1), 4)) e->refs2.push_back(d.src(o, Type::B32));
  else
    d.out.a = d.src(1, Type::B64);
  d.out.b = d.src(2, Type::B64);
  d.out.c = d.pred(d.arg(3));
  if (!s.integer()) {
    s.sign = (int)(d.intArg(4) * d.intArg(5));
    if (std::abs(d.intArg(4)) != 1 || std::abs(s.sign) != 1) d.fail("scale-a and scale-b must be 1 or -1");
  }
  if (s.half()) {
    s.transA = !s.registersA && d.intArg(6) != 0;
    s.transB = d.intArg(d.argc() - 1) != 0;
  }
  d.out.fn = mmaAsync;
}

const Forms kForms = {
    {"wgmma", "fence sync aligned", "", fence},
    {"wgmma", "commit_group sync aligned", "", commitGroup<&Warp::wgmma>},
    {"wgmma", "wait_group sync aligned", "imm", waitGroup},
    {"wgmma", "mma_async sync aligned satfinite? type type type", nullptr, decodeWgmma},
};

}  // namespace
}  // namespace ptxsim
