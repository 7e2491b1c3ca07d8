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
  w.reschedule |= m != f.mask || w.frags.size() > 1;
  if (m == f.mask) {
    f.stack = std::move(stack);
    w.next = target;
    return;
  }
  f.mask &= ~m;
  Fragment& other = w.frags.emplace_back();
  other.mask = m;
  other.pc = target;
  other.stack = std::move(stack);
}
void call(Warp& w, const Inst& in, uint32_t m) {
  copyFrame(w, in.ext->args, m);
  std::vector<Frame> stack = w.frag().stack;
  stack.push_back({(int)w.pc + 1, in.ext});
  enter(w, m, (uint32_t)in.imm, std::move(stack));
}
void ret(Warp& w, const Inst&, uint32_t m) {
  std::vector<Frame> stack = w.frag().stack;
  if (stack.empty()) return w.exitLanes(m);
  const Frame top = stack.back();
  stack.pop_back();
  copyFrame(w, top.call->rets, m);
  enter(w, m, (uint32_t)top.returnPc, std::move(stack));
}
void exitThread(Warp& w, const Inst&, uint32_t m) { w.exitLanes(m); }
void trap(Warp& w, const Inst& in, uint32_t m) { w.fail(in, firstLane(m), "trap"); }
void gridSignal(Warp& w, const Inst&, uint32_t) { w.launch->signalled = true; }
void gridWait(Warp& w, const Inst&, uint32_t) {
  w.launch->waited = true;
  raceGridWait(w);
}
void nothing(Warp&, const Inst&, uint32_t) {}

const char* cstring(Warp& w, const Inst& in, int lane, uint64_t a) {
  auto at = [&](uint64_t p) { return (const char*)locate(w, in, lane, Space::Generic, p, 1, Kind::Read, 1).p; };
  for (uint64_t p = a; *at(p); ++p) continue;
  return at(a);
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
      if (*f != '%' || f[1] == '%') {
        f += *f == '%';
        out += *f++;
        continue;
      }
      std::string spec(1, *f);
      bool wide = false;
      for (++f; *f && !strchr("diouxXcsfFeEgGaAp", *f); ++f) {
        wide |= strchr("ljzt", *f) != nullptr;
        if (!strchr("hljzt", *f)) spec += *f;
      }
      const char c = *f ? *f++ : 'd';
      const bool real = strchr("fFeEgGaA", c);
      const unsigned size = real || wide || c == 's' || c == 'p' ? 8 : 4;
      char text[512];
      uint64_t v = 0;
      at = (at + size - 1) / size * size;
      memcpy(&v, locate(w, in, lane, Space::Generic, buf + at, size, Kind::Read, 4).p, size);
      at += size;
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
  auto copies = [&](const Operand* actual, const std::vector<Var*>& formal, bool in) {
    std::vector<Extra::Copy> list;
    if (formal.size() != (actual ? actual->sub.size() : 0)) d.fail("'", f->name, "' takes other operands");
    for (size_t i = 0; i < formal.size(); ++i) {
      const uint32_t here = d.kb.frameOffset(var(actual->sub[i])),
                     there = f->hasBody ? d.kb.frameOffset(*formal[i]) : 0;
      list.push_back({in ? here : there, in ? there : here, (uint32_t)formal[i]->bytes});
    }
    return list;
  };
  e->args = copies(args, f->params, true);
  e->rets = copies(rets, f->returns, false);
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
  const bool dec = in.x[0];
  const int more = ((int)in.imm - (int)w.maxnreg) * 32;
  if (dec ? more > 0 : more < 0)
    w.fail(in, firstLane(m), "setmaxnreg.", dec ? "dec" : "inc", " to ", in.imm, ", but the warp has ",
           dec ? "only " : "", w.maxnreg, " registers a thread");
  if (w.cta->regPool < more) return w.block(Wait::Poll, waitsForRegisters);
  w.cta->regPool -= more;
  w.maxnreg = (unsigned)in.imm;
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

const Forms kForms = {
    {"bra", "(uni)", nullptr, decodeBra},
    {"brx", "idx (uni)", nullptr, decodeBrx},
    {"call", "(uni)", nullptr, decodeCall},
    {"ret", "(uni)", "", ret},
    {"exit", "", "", exitThread},
    {"trap|brkpt", "", "", trap},
    {"nanosleep", "u32", "a", nothing},
    {"griddepcontrol", "wait", "", gridWait},
    {"griddepcontrol", "launch_dependents", "", gridSignal},
    {"fence|membar", "global|shared::cta|shared::cluster? sc|acq_rel|acquire|release? (cta|cluster|gpu|sys|gl)",
     nullptr, decodeFence},
    {"setmaxnreg", "inc|dec sync aligned u32", "imm", decodeSetmaxnreg},
};

}  // namespace
}  // namespace ptxsim
