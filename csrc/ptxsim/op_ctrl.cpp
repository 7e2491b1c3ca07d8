// Branches, calls, exit, traps, fences and hints (PTX ISA 9.7.12, 9.7.13.5, 9.7.19).
#include "ops.h"
#include "race.h"

namespace ptxsim {
namespace {

void bra(Warp& w, const Inst& in, uint32_t m) {
  ++w.launch->n.branches;
  w.jump(m, (uint32_t)in.imm);
}
// brx.idx: every lane to its own entry of the list
void brx(Warp& w, const Inst& in, uint32_t m) {
  w.needValid(in, in.a, m, "branch index");
  const auto& targets = in.ext->targets;
  for (uint32_t left = m, same = 0; left; left &= ~same, same = 0) {
    const uint32_t idx = lane32(w, in.a, (unsigned)firstLane(left));
    for (int i : lanesOf(left)) same |= (uint32_t)(lane32(w, in.a, (unsigned)i) == idx) << i;
    if (idx >= targets.size()) w.fail(in, firstLane(left), "branch index ", idx, " of ", targets.size(), " targets");
    ++w.launch->n.branches;
    w.jump(same, (uint32_t)targets[idx]);
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

void call(Warp& w, const Inst& in, uint32_t m) {
  copyFrame(w, in.ext->args, m);
  w.jump(m, (uint32_t)in.imm).calls.push_back(w.pc);
}
void ret(Warp& w, const Inst&, uint32_t m) {
  if (w.frag().calls.empty()) return w.exitLanes(m);
  const uint32_t call = w.frag().calls.back();
  copyFrame(w, w.kernel->code[call].ext->rets, m);
  w.jump(m, call + 1).calls.pop_back();
}
void exitThread(Warp& w, const Inst&, uint32_t m) { w.exitLanes(m); }
void trap(Warp& w, const Inst& in, uint32_t m) { w.fail(in, firstLane(m), "trap"); }
void gridSignal(Warp& w, const Inst&, uint32_t) { w.launch->signalled = true; }
void gridWait(Warp& w, const Inst&, uint32_t) {
  w.launch->waited = true;
  raceGridWait(w);
}

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
    uint64_t at = frame64(w, lane, in.ext->args[1].from);
    std::string out;
    for (size_t n; *f; f += n + 1) {
      n = *f == '%' ? 1 + strcspn(f + 1, "%diouxXcsfFeEgGaAp") : 0;  // of the specification before its last character
      const char c = f[n];
      if (!c) break;
      if (!n || c == '%') {
        out += c;
        continue;
      }
      const bool wide = std::any_of(f, f + n, [](char x) { return strchr("ljzt", x); }), real = strchr("fFeEgGaA", c);
      const unsigned size = wide || real || strchr("sp", c) ? 8 : 4;
      std::string spec;
      std::remove_copy_if(f, f + n, std::back_inserter(spec), [](char x) { return strchr("hljzt", x); });
      at = (at + size - 1) / size * size;
      uint64_t v = 0;
      memcpy(&v, locate(w, in, lane, Space::Generic, at, size, Kind::Read, 4).p, size);
      at += size;
      char text[512];
      auto print = [&](const std::string& as, auto value) { snprintf(text, sizeof text, as.c_str(), value); };
      if (real)
        print(spec + c, bitsAs<double>(v));
      else if (c == 's')
        print(spec + c, cstring(w, in, lane, v));
      else if (size == 4)
        print(spec + c, (uint32_t)v);
      else
        print(c == 'p' ? "0x%llx" : spec + "ll" + c, v);
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
  const Operand *name = nullptr, *args = nullptr, *rets = nullptr;  // (results), name, (arguments)
  for (auto& a : d.p.args) (a.kind != Operand::List ? name : name ? args : rets) = &a;
  if (!name || name->kind != Operand::Name) d.fail("indirect calls are not supported");
  Extra* e = d.extra();
  e->text = name->name;
  auto var = [&](const Operand& o) -> const Var& {
    if (o.kind != Operand::Symbol || o.var->space != Space::Param) d.fail("call operands must be .param variables");
    return *o.var;
  };
  const Func* f = callee(*d.kb.k.module, d.p);
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
  auto* target = d.fn.find(d.p.scope, &Func::Scope::labels, name);
  if (!target) d.fail("label '", name, "' does not exist");
  return (int)d.kb.start[&d.fn] + *target;
}
void decodeBra(Dec& d) {
  d.wantArgs(1);
  d.out.imm = label(d, d.arg(0).name);
  d.out.fn = bra;
}
void decodeBrx(Dec& d) {
  d.wantArgs(2);
  d.out.a = d.src(0, Type::U32);
  auto* list = d.fn.find(d.p.scope, &Func::Scope::targets, d.arg(1).name);
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
