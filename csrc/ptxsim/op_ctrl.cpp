// Branches, calls, exit, traps, fences and hints (PTX ISA 9.7.12, 9.7.13.5, 9.7.19).
#include <cstdio>

#include "ops.h"
#include "race.h"

namespace ptxsim {
namespace {

void bra(Warp& w, const Inst& in, uint32_t m) { w.jump(m, (uint32_t)in.imm, w.frag().mask); }

// brx.idx: every lane to its own entry of the list
void brx(Warp& w, const Inst& in, uint32_t m) {
  w.needValid(in, in.a, m, "branch index");
  const auto& targets = in.ext->targets;
  for (uint32_t left = m; left;) {
    uint32_t idx = lane32(w, in.a, (unsigned)firstLane(left)), same = 0;
    for (uint32_t l = left; l; l &= l - 1)
      if (lane32(w, in.a, (unsigned)firstLane(l)) == idx) same |= 1u << firstLane(l);
    if (idx >= targets.size()) w.fail(in, firstLane(left), "branch index ", idx, " of ", targets.size(), " targets");
    left &= ~same;
    w.jump(same, (uint32_t)targets[idx], w.frag().mask);
  }
}

void copyFrame(Warp& w, const std::vector<Extra::Copy>& copies, uint32_t m) {
  const size_t n = w.kernel->localBytes;
  for (auto& c : copies)
    for (int i : lanesOf(m)) {
      const size_t lane = (size_t)i * n;
      memcpy(w.local + lane + c.to, w.local + lane + c.from, c.bytes);
      memcpy(w.localValid + lane + c.to, w.localValid + lane + c.from, c.bytes);
    }
}

// Moves the lanes of m to `target` with another call stack.
void enter(Warp& w, uint32_t m, uint32_t target, std::vector<Frame> stack) {
  Fragment& f = w.frag();
  if (m == f.mask) {
    f.stack = std::move(stack);
    w.next = target;
    if (w.frags.size() > 1) w.reschedule = true;
    return;
  }
  Fragment other;
  other.mask = m;
  other.pc = target;
  other.stack = std::move(stack);
  f.mask &= ~m;
  w.frags.push_back(std::move(other));
  w.reschedule = true;
}
void call(Warp& w, const Inst& in, uint32_t m) {
  copyFrame(w, in.ext->args, m);
  std::vector<Frame> stack = w.frag().stack;
  stack.push_back({(int)w.pc + 1, in.ext});
  enter(w, m, (uint32_t)in.imm, std::move(stack));
}
void ret(Warp& w, const Inst&, uint32_t m) {
  if (w.frag().stack.empty()) {
    w.exitLanes(m);
    return;
  }
  std::vector<Frame> stack = w.frag().stack;
  Frame top = stack.back();
  stack.pop_back();
  copyFrame(w, top.call->rets, m);
  enter(w, m, (uint32_t)top.returnPc, std::move(stack));
}
void exitThread(Warp& w, const Inst&, uint32_t m) { w.exitLanes(m); }
void trap(Warp& w, const Inst& in, uint32_t m) { w.fail(in, firstLane(m), "trap"); }
void nothing(Warp&, const Inst&, uint32_t) {}

const char* cstring(Warp& w, const Inst& in, int lane, uint64_t a) {
  for (uint64_t p = a;; ++p)
    if (*locate(w, in, lane, Space::Generic, p, 1, Kind::Read, 1).p == 0) break;
  return (const char*)locate(w, in, lane, Space::Generic, a, 1, Kind::Read, 1).p;
}
uint64_t frame64(Warp& w, int lane, uint32_t off) {
  uint64_t v;
  memcpy(&v, w.local + (size_t)lane * w.kernel->localBytes + off, 8);
  return v;
}
// vprintf(format, argument buffer): the arguments lie at their natural alignment, floats as doubles.
void vprintf(Warp& w, const Inst& in, uint32_t m) {
  for (int lane : lanesOf(m)) {
    const char* f = cstring(w, in, lane, frame64(w, lane, in.ext->args[0].from));
    uint64_t buf = frame64(w, lane, in.ext->args[1].from);
    std::string out;
    uint64_t at = 0;
    while (*f) {
      if (*f != '%') {
        out += *f++;
        continue;
      }
      std::string spec(1, *f++);
      if (*f == '%') {
        out += *f++;
        continue;
      }
      bool wide = false;
      while (*f && !strchr("diouxXcsfFeEgGaAp", *f)) {
        if (*f == 'l' || *f == 'j' || *f == 'z' || *f == 't')
          wide = true;
        else if (*f != 'h')
          spec += *f;
        ++f;
      }
      char c = *f ? *f++ : 'd', text[512];
      bool real = strchr("fFeEgGaA", c), eight = real || wide || c == 's' || c == 'p';
      at = eight ? (at + 7) / 8 * 8 : (at + 3) / 4 * 4;
      uint64_t v = 0;
      memcpy(&v, locate(w, in, lane, Space::Generic, buf + at, eight ? 8 : 4, Kind::Read, 4).p, eight ? 8 : 4);
      at += eight ? 8 : 4;
      if (real)
        snprintf(text, sizeof text, (spec + c).c_str(), bitsAs<double>(v));
      else if (c == 's')
        snprintf(text, sizeof text, (spec + c).c_str(), cstring(w, in, lane, v));
      else if (c == 'p')
        snprintf(text, sizeof text, "0x%llx", (unsigned long long)v);
      else if (wide)
        snprintf(text, sizeof text, (spec + "ll" + c).c_str(), (long long)v);
      else
        snprintf(text, sizeof text, (spec + c).c_str(), (int)v);
      out += text;
    }
    fputs(out.c_str(), stdout);
    fflush(stdout);
  }
}
void assertFail(Warp& w, const Inst& in, uint32_t m) {
  int lane = firstLane(m);
  std::string msg = cstring(w, in, lane, frame64(w, lane, in.ext->args[0].from));
  w.fail(in, lane, "device assertion failed: ", msg);
}

void decodeCall(Dec& d) {
  const Operand *name = nullptr, *args = nullptr, *rets = nullptr;
  for (auto& a : d.p.args) {
    if (a.kind == Operand::Name && !name)
      name = &a;
    else if (a.kind == Operand::List && !name)
      rets = &a;
    else if (a.kind == Operand::List)
      args = &a;
  }
  if (!name) d.fail("indirect calls are not supported");
  Extra* e = d.extra();
  e->text = name->name;
  auto var = [&](const Operand& o) -> const Var& {
    if (o.kind != Operand::Symbol || o.var->space != Space::Param) d.fail("call operands must be .param variables");
    return *o.var;
  };
  const Func* f = callee(d.kb.module, d.p);
  if (!f) d.fail("unknown function '", name->name, "'");
  const size_t na = args ? args->sub.size() : 0, nr = rets ? rets->sub.size() : 0;
  if (na != f->params.size() || nr != f->returns.size()) d.fail("'", f->name, "' takes other operands");
  for (size_t i = 0; i < na; ++i)
    e->args.push_back({d.kb.frameOffset(var(args->sub[i])), f->hasBody ? d.kb.frameOffset(*f->params[i]) : 0,
                       (uint32_t)f->params[i]->bytes});
  for (size_t i = 0; i < nr; ++i)
    e->rets.push_back({f->hasBody ? d.kb.frameOffset(*f->returns[i]) : 0, d.kb.frameOffset(var(rets->sub[i])),
                       (uint32_t)f->returns[i]->bytes});
  d.out.imm = d.kb.start[f];
  if (f->hasBody)
    d.out.fn = call;
  else if (f->name == "vprintf")
    d.out.fn = vprintf;
  else if (f->name == "__assertfail")
    d.out.fn = assertFail;
  else
    d.fail("function '", f->name, "' has no body");
}

// setmaxnreg: the registers that a warp gives up go to the CTA's pool, and those it asks for must be there.
std::string waitsForRegisters(Warp& w, const Inst& in) {
  return cat("setmaxnreg.inc to ", in.imm, ": waits for ", (in.imm - w.maxnreg) * 32, " registers, the CTA's pool has ",
             w.cta->regPool);
}
void setmaxnreg(Warp& w, const Inst& in, uint32_t m) {
  unsigned want = (unsigned)in.imm;
  if (in.x[0] == 0) {
    if (want < w.maxnreg)
      w.fail(in, firstLane(m), "setmaxnreg.inc to ", want, ", but the warp has ", w.maxnreg, " registers a thread");
    int need = (int)(want - w.maxnreg) * 32;
    if (w.cta->regPool < need) {
      w.block(Wait::Poll, waitsForRegisters);
      return;
    }
    w.cta->regPool -= need;
  } else {
    if (want > w.maxnreg)
      w.fail(in, firstLane(m), "setmaxnreg.dec to ", want, ", but the warp has only ", w.maxnreg,
             " registers a thread");
    w.cta->regPool += (int)(w.maxnreg - want) * 32;
  }
  w.maxnreg = want;
  w.launch->progress();
}

void decodeSetmaxnreg(Dec& d) {
  if (d.out.imm < 24 || d.out.imm > 256 || d.out.imm % 8) d.fail("the count must be a multiple of 8 in 24..256");
  d.out.fn = setmaxnreg;
}

void decodeFence(Dec& d) {  // what raceFence reads: x[0] kind, x[1] order, x[2] space
  Inst& o = d.out;
  o.x[2] = o.x[0];
  o.x[0] = d.take("mbarrier_init") ? FenceMbarrierInit : FenceMemory;
  if (d.takePrefix("proxy::async") || d.takePrefix("async")) o.x[0] = FenceAsync;
  if (d.takePrefix("tensormap")) o.x[0] = FenceTensormap;
  if (d.take("alias")) o.x[0] = FenceAlias;
  if (d.takePrefix("sync_restrict")) o.x[0] = FenceMemory;
  d.takePrefix("proxy");
  o.fn = raceFence;
}

int label(Dec& d, const std::string& name) {
  const int target = d.fn.findLabel(d.p.scope, name);
  if (target < 0) d.fail("label '", name, "' does not exist");
  return (int)d.kb.start[&d.fn] + target;
}
void decodeBra(Dec& d) {
  d.wantArgs(1);
  d.out.imm = label(d, d.arg(0).name);
  d.out.fn = bra;
}
void decodeBrx(Dec& d) {
  d.wantArgs(2);
  d.out.a = d.src(0, Type::U32);
  auto* list = d.fn.findTargets(d.p.scope, d.arg(1).name);
  if (!list) d.fail("branch target list '", d.arg(1).name, "' does not exist");
  for (auto& name : *list) d.extra()->targets.push_back(label(d, name));
  d.out.fn = brx;
}

constexpr char kFence[] = "global|shared::cta|shared::cluster? sc|acq_rel|acquire|release? (cta|cluster|gpu|sys|gl)";
const Forms kForms = {
    {"bra", "(uni)", nullptr, decodeBra},
    {"brx", "idx (uni)", nullptr, decodeBrx},
    {"call", "(uni)", nullptr, decodeCall},
    {"ret", "(uni)", "", ret},
    {"exit", "", "", exitThread},
    {"trap", "", "", trap},
    {"brkpt", "", "", trap},
    {"nanosleep", "u32", "a", nothing},
    {"griddepcontrol", "wait|launch_dependents", "", nothing},
    {"fence", kFence, nullptr, decodeFence},
    {"membar", kFence, nullptr, decodeFence},
    {"setmaxnreg", "inc|dec sync aligned u32", "imm", decodeSetmaxnreg},
};

}  // namespace
}  // namespace ptxsim
