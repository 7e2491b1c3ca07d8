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
  d.take("uni");
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
  auto it = d.kb.module.funcByName.find(name->name);
  const Func* f = it == d.kb.module.funcByName.end() ? nullptr : it->second;
  if (!f) d.fail("unknown function '", name->name, "'");
  const size_t na = args ? args->sub.size() : 0, nr = rets ? rets->sub.size() : 0;
  if (na != f->params.size() || nr != f->returns.size()) d.fail("'", f->name, "' takes other operands");
  for (size_t i = 0; i < na; ++i)
    e->args.push_back({d.kb.frameOffset(var(args->sub[i])), f->hasBody ? d.kb.frameOffset(*f->params[i]) : 0,
                       (uint32_t)f->params[i]->bytes});
  for (size_t i = 0; i < nr; ++i)
    e->rets.push_back({f->hasBody ? d.kb.frameOffset(*f->returns[i]) : 0, d.kb.frameOffset(var(rets->sub[i])),
                       (uint32_t)f->returns[i]->bytes});
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
  return "setmaxnreg.inc to " + std::to_string(in.imm) + ": waits for " + std::to_string((in.imm - w.maxnreg) * 32) +
         " registers, the CTA's pool has " + std::to_string(w.cta->regPool);
}
void setmaxnreg(Warp& w, const Inst& in, uint32_t m) {
  unsigned want = (unsigned)in.imm;
  if (in.x[0]) {
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

void fence(Warp& w, const Inst& in, uint32_t m) { raceFence(w, in, m); }

void decodeFence(Dec& d) {
  Inst& o = d.out;
  // x[0]: 0 plain memory fence, 1 proxy.async, 2 proxy.tensormap, 3 mbarrier_init, 4 other; x[1] scope; x[2] spaces
  if (d.take("mbarrier_init")) o.x[0] = 3;
  for (size_t i = 1; i < d.p.op.size(); ++i) {
    const std::string& s = d.p.op[i];
    if (s.compare(0, 5, "proxy") == 0) d.used[i] = true;
    if (s == "proxy::async" || s == "async") o.x[0] = 1, d.used[i] = true;
    if (s.compare(0, 9, "tensormap") == 0) o.x[0] = 2, d.used[i] = true;
    if (s == "alias" || s.compare(0, 7, "async::") == 0) o.x[0] = s == "alias" ? 4 : 1, d.used[i] = true;
    if (s.compare(0, 13, "sync_restrict") == 0) o.x[0] = 0, d.used[i] = true;
  }
  o.x[2] = (uint8_t)(1 + d.takeOneOf({"global", "shared::cta", "shared::cluster"}));
  o.x[3] = (uint8_t)(1 + d.takeOneOf({"sc", "acq_rel", "acquire", "release"}));
  int scope = d.takeOneOf({"cta", "cluster", "gpu", "sys", "gl"});
  o.x[1] = (uint8_t)(scope < 0 ? 3 : scope);
  d.out.fn = fence;
}

}  // namespace

static void addControlOps(OpTable& t) {
  t["bra"] = [](Dec& d) {
    d.take("uni");
    d.wantArgs(1, 1);
    if (d.arg(0).kind != Operand::Name) d.fail("a label is expected");
    int target = d.fn.findLabel(d.p.scope, d.arg(0).name);
    if (target < 0) d.fail("label '", d.arg(0).name, "' does not exist");
    d.out.imm = target;
    d.out.fn = bra;
  };
  t["brx"] = [](Dec& d) {
    d.take("idx");
    d.take("uni");
    d.wantArgs(2, 2);
    d.out.a = d.src(0, Type::U32);
    auto* list = d.fn.findTargets(d.p.scope, d.arg(1).name);
    if (!list) d.fail("branch target list '", d.arg(1).name, "' does not exist");
    for (auto& l : *list) {
      int target = d.fn.findLabel(d.p.scope, l);
      if (target < 0) d.fail("label '", l, "' does not exist");
      d.extra()->targets.push_back(target);
    }
    d.out.fn = brx;
  };
  t["call"] = decodeCall;
  t["ret"] = [](Dec& d) {
    d.take("uni");
    d.out.fn = ret;
  };
  t["exit"] = [](Dec& d) { d.out.fn = exitThread; };
  t["trap"] = [](Dec& d) { d.out.fn = trap; };
  t["brkpt"] = [](Dec& d) { d.out.fn = trap; };
  t["nanosleep"] = [](Dec& d) {
    d.needType();
    d.out.fn = nothing;
  };
  t["griddepcontrol"] = [](Dec& d) {
    if (d.takeOneOf({"wait", "launch_dependents"}) < 0) d.fail("an action is missing");
    d.out.fn = nothing;
  };
  t["fence"] = decodeFence;
  t["membar"] = decodeFence;
  t["setmaxnreg"] = [](Dec& d) {
    int k = d.takeOneOf({"inc", "dec"});
    d.take("sync");
    d.take("aligned");
    d.needType();
    d.wantArgs(1, 1);
    d.out.imm = d.intArg(0);
    if (d.out.imm < 24 || d.out.imm > 256 || d.out.imm % 8) d.fail("the count must be a multiple of 8 in 24..256");
    d.out.x[0] = k == 0;
    d.out.convergeAll = true;
    d.out.fn = setmaxnreg;
  };
}

static const bool kAdded = (addControlOps(opTable()), true);
}  // namespace ptxsim
