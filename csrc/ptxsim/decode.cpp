#include "decode.h"

#include <algorithm>
#include <cmath>

namespace ptxsim {

OpTable& opTable() {
  static OpTable table;
  return table;
}
Forms::Forms(std::initializer_list<Form> forms) {
  for (auto f = forms.end(); f-- != forms.begin();) {
    auto& known = opTable().unordered_map::operator[](f->name);
    known.insert(known.begin(), *f);
  }
}
// ---- module variables

uint64_t globalAddress(Module& m, Var& v) {
  if (v.address) return v.address;
  if (v.isExtern) throw Error("variable '", v.name, "' is declared .extern and defined nowhere");
  v.address =
      Arena::get().allocate(std::max<uint64_t>(v.bytes, 1), v.name, true);  // written below, then as the module says
  if (!v.init.empty()) memcpy((void*)v.address, v.init.data(), v.init.size());
  for (auto& r : v.relocs) {
    auto it = m.varByName.find(r.second);
    if (it == m.varByName.end()) throw Error("initialiser of '", v.name, "' refers to unknown '", r.second, "'");
    uint64_t value;
    memcpy(&value, (void*)(v.address + r.first), 8);
    value += globalAddress(m, *it->second);
    memcpy((void*)(v.address + r.first), &value, 8);
  }
  if (v.space == Space::Const) Arena::get().find(v.address, 1)->writable = false;
  return v.address;
}

// ---- KernelBuilder

static unsigned slotBytes(Type t) { return t == Type::Pred ? 4 : std::max(2u, typeBytes(t)); }

Ref KernelBuilder::reg(const Func& f, int index, unsigned* bytes) {
  auto& table = regs[&f];
  if (table.size() < f.regs.size()) table.resize(f.regs.size(), Placed{0, 0, 0});
  Placed& p = table[(size_t)index];
  if (!p.id) {
    Type t = f.regs[(size_t)index].type;
    p.bytes = t == Type::Pred ? 0 : slotBytes(t);
    p.id = k.numIds++;
    p.off = k.regBytes;
    k.regBytes += t == Type::Pred ? 64 : p.bytes * kLanes;
  }
  if (bytes) *bytes = p.bytes;
  return {p.off, p.id};
}

Ref KernelBuilder::special(const Special& s, unsigned dimension, unsigned bytes, uint32_t add) {
  for (auto& u : k.specials)
    if (u.special == &s && u.dimension == dimension && u.bytes == bytes && u.add == add) return {u.off, 0};
  k.specials.push_back({&s, k.regBytes, (uint8_t)bytes, (uint8_t)dimension, add});
  k.regBytes += bytes * kLanes;
  return {k.specials.back().off, 0};
}

uint32_t KernelBuilder::sharedOffset(const Var& v) {
  auto it = shared.find(&v);
  if (it != shared.end()) return it->second;
  if (v.isExtern) throw Error("dynamic shared memory '", v.name, "' was not placed");
  uint32_t off = (kSharedReserved + k.staticShared + v.align - 1) / v.align * v.align;
  k.staticShared = off + (uint32_t)v.bytes - kSharedReserved;
  k.sharedVars.emplace_back(off, const_cast<Var*>(&v));
  return shared[&v] = off;
}

uint32_t KernelBuilder::frameOffset(const Var& v) {
  auto it = frame.find(&v);
  if (it != frame.end()) return it->second;
  unsigned align = std::max(v.align, 1u);
  uint32_t off = (k.localBytes + align - 1) / align * align;
  k.localBytes = off + (uint32_t)std::max<uint64_t>(v.bytes, 1);
  return frame[&v] = off;
}

// ---- Dec

// The text up to the separator, which `text` loses with it.
static std::string_view cut(std::string_view& text, char separator) {
  const std::string_view first = text.substr(0, text.find(separator));
  text.remove_prefix(std::min(text.size(), first.size() + 1));
  return first;
}
static bool dropEnd(std::string_view& text, std::string_view end) {
  if (text.size() < end.size() || text.substr(text.size() - end.size()) != end) return false;
  text.remove_suffix(end.size());
  return true;
}

bool Dec::has(std::string_view mod) const {
  for (size_t i = 1; i < p.op.size(); ++i)
    if (!used[i] && p.op[i] == mod) return true;
  return false;
}
bool Dec::take(std::string_view mod) {
  for (size_t i = 1; i < p.op.size(); ++i)
    if (!used[i] && p.op[i] == mod) {
      used[i] = true;
      return true;
    }
  return false;
}
int Dec::takeOneOf(std::initializer_list<const char*> mods) {
  int n = 0;
  for (auto m : mods) {
    if (take(m)) return n;
    ++n;
  }
  return -1;
}
int Dec::takeOneOf(std::string_view mods) {
  for (int n = 0; !mods.empty(); ++n)
    if (take(cut(mods, '|'))) return n;
  return -1;
}

std::string Dec::choose(const Form& form) {
  unsigned next = 0;
  for (std::string_view words = form.modifiers; !words.empty();) {
    std::string_view word = cut(words, ' ');
    const bool any = word == "type", integer = word == "int", half = word == "half";
    if (const Type wanted = typeFromName(std::string(word)); any || integer || half || wanted != Type::None) {
      const Type t = takeType();
      if (t == Type::None) return "a type is missing";
      types.push_back(t);
      if (integer ? isFloat(t) : half ? t < Type::F16 || t > Type::BF16x2 : !any && t != wanted)
        return "this type is not supported";
      continue;
    }
    if (word == "space" || word == "vector") {
      word == "space" ? takeSpace() : takeVector();
      continue;
    }
    if (word[0] == '(') {
      takeOneOf(word.substr(1, word.size() - 2));
      continue;
    }
    const bool optional = dropEnd(word, "?"), several = word.find('|') != word.npos;
    const int which = takeOneOf(word);
    if (which < 0 && !optional) return cat(several ? "one of ." : ".", std::string(word), " is missing");
    out.convergeAll |= word == "aligned" && which == 0;
    if (optional || several) out.x[next++] = (uint8_t)(which + optional);
  }
  if (!form.operands) return "";
  const std::string_view words = form.operands;
  const size_t most = words.empty() ? 0 : 1 + (size_t)std::count(words.begin(), words.end(), ' '),
               least = most - (size_t)std::count(words.begin(), words.end(), '?');
  if (argc() < least || argc() > most) return cat("takes ", least, " to ", most, " operands, got ", argc());
  operands(words);
  return "";
}

void Dec::operands(std::string_view words) {
  for (size_t i = 0; !words.empty(); ++i) {
    std::string_view word = cut(words, ' ');
    if (word == "imm") out.imm = intArg(i);
    if (word == "[a]") out.a = address(arg(i), &out.imm);
    if (word == "imm" || word == "[a]") continue;
    const bool absent = dropEnd(word, "?") && i >= argc(), pair = dropEnd(word, "|p"), list = dropEnd(word, "}");
    const std::string_view slot = cut(word, ':');
    const char name = slot[list];
    const Type t = word.empty()       ? types.at(0)
                   : isdigit(word[0]) ? types.at((size_t)(word[0] - '0'))
                   : word == "wide"   ? (Type)((int)types.at(0) + 1)
                                      : typeFromName(std::string(word));
    auto ref = [&](const Operand& o) {
      if (name == 'd') return t == Type::Pred ? predDst(o) : dst(o, std::max(2u, typeBytes(t)));
      return t == Type::Pred ? pred(o) : src(o, t);
    };
    if (list) {
      for (auto& part : elements(arg(i), out.vec)) extra()->refs.push_back(ref(part));
      continue;
    }
    const bool two = pair && arg(i).kind == Operand::Pair;
    const Ref r = absent ? Ref() : ref(two ? arg(i).sub[0] : arg(i));
    if (name == 'e')
      extra()->refs.push_back(r);
    else
      (name == 'd' ? out.d : name == 'a' ? out.a : name == 'b' ? out.b : out.c) = r;
    if (pair) extra()->refs.push_back(two ? predDst(arg(i).sub[1]) : Ref());
  }
}

Type Dec::takeType() {
  for (size_t i = 1; i < p.op.size(); ++i)
    if (!used[i]) {
      Type t = typeFromName(p.op[i]);
      if (t != Type::None) {
        used[i] = true;
        return t;
      }
    }
  return Type::None;
}
Type Dec::needType() {
  Type t = takeType();
  if (t == Type::None) fail("a type is missing");
  return t;
}
void Dec::takeSpace() {
  static const std::pair<const char*, Space> kSpaces[] = {
      {"global", Space::Global},          {"shared", Space::Shared},     {"shared::cta", Space::Shared},
      {"shared::cluster", Space::Shared}, {"local", Space::Local},       {"param", Space::Param},
      {"param::entry", Space::Param},     {"param::func", Space::Param}, {"const", Space::Const}};
  out.x[4] = has("shared::cluster");
  for (auto& s : kSpaces)
    if (take(s.first)) {
      out.space = s.second;
      return;
    }
}
void Dec::takeVector() { out.vec = (uint8_t)(1u << (1 + takeOneOf("v2|v4|v8"))); }
bool Dec::takePrefix(std::string_view prefix) {
  bool any = false;
  for (size_t i = 1; i < p.op.size(); ++i)
    if (p.op[i].compare(0, prefix.size(), prefix) == 0) used[i] = any = true;
  return any;
}
void Dec::wantArgs(size_t lo, size_t hi) {
  if (p.args.size() < lo || p.args.size() > hi) fail("takes ", lo, " to ", hi, " operands, got ", p.args.size());
}
const Operand& Dec::arg(size_t i) const {
  if (i >= p.args.size()) fail("operand ", i, " is missing");
  return p.args[i];
}
std::vector<Operand> Dec::elements(const Operand& o, size_t n) const {
  const std::vector<Operand> parts = o.kind == Operand::Vector ? o.sub : std::vector<Operand>{o};
  if (parts.size() != n) fail("wrong number of registers: ", n, " are expected");
  return parts;
}
Extra* Dec::extra() {
  if (!out.ext) {
    kb.k.extras.emplace_back();
    out.ext = &kb.k.extras.back();
  }
  return const_cast<Extra*>(out.ext);
}
int64_t Dec::intArg(size_t i) const {
  if (arg(i).kind != Operand::Int) fail("operand ", i, " must be an integer constant");
  return arg(i).i;
}

unsigned Dec::regBytes(const Operand& o) const {
  if (o.kind != Operand::Register) return 0;
  unsigned b;
  kb.reg(fn, o.reg, &b);
  return b;
}

Ref Dec::constant(uint64_t bits, unsigned bytes) {
  if (bytes < 8) bits &= (1ull << (8 * bytes)) - 1;
  std::string key = std::to_string(bytes) + ":" + std::to_string(bits);
  auto it = kb.consts.find(key);
  if (it != kb.consts.end()) return it->second;
  auto& pool = kb.k.constants;
  Ref r{(uint32_t)(pool.size() * 8) | Ref::kConstBit, 0};
  size_t words = bytes * kLanes / 8, at = pool.size();
  pool.resize(at + words, 0);
  uint8_t* to = reinterpret_cast<uint8_t*>(&pool[at]);
  for (unsigned l = 0; l < kLanes; ++l) memcpy(to + l * bytes, &bits, std::min(bytes, 8u));
  return kb.consts[key] = r;
}

uint64_t immediateBits(const Operand& o, Type t, const Dec& d) {
  uint64_t bits = 0;
  if (o.kind == Operand::Float) {
    if (o.width == 32 && (t == Type::F64)) {
      float f;
      uint32_t b = (uint32_t)o.bits;
      memcpy(&f, &b, 4);
      double x = f;
      memcpy(&bits, &x, 8);
      return bits;
    }
    if (o.width == 64 && typeBytes(t) == 4) {
      double x;
      memcpy(&x, &o.bits, 8);
      float f = (float)x;
      memcpy(&bits, &f, 4);
      return bits;
    }
    return o.bits;
  }
  if (o.kind != Operand::Int) d.fail("expected a constant");
  if (t == Type::F32) {  // an integer constant in a float instruction is a value
    float f = (float)o.i;
    memcpy(&bits, &f, 4);
    return bits;
  }
  if (t == Type::F64) {
    double x = (double)o.i;
    memcpy(&bits, &x, 8);
    return bits;
  }
  return (uint64_t)o.i;
}

Ref Dec::dst(const Operand& o, unsigned bytes) {
  if (o.kind == Operand::Sink) {  // a slot nobody reads
    Ref r{kb.k.regBytes, kb.k.numIds++};
    kb.k.regBytes += std::max(bytes, 8u) * kLanes;
    return r;
  }
  if (o.kind != Operand::Register) fail("the destination must be a register");
  unsigned b;
  Ref r = kb.reg(fn, o.reg, &b);
  if (b == 0) fail("register ", fn.regs[(size_t)o.reg].name, " is a predicate");
  if (bytes && b != bytes)
    fail("register ", fn.regs[(size_t)o.reg].name, " has ", b * 8, " bits, the instruction wants ", bytes * 8);
  return r;
}

bool Dec::unknown(size_t i) const {
  const int reg = arg(i).kind == Operand::Register ? arg(i).reg : -1;
  size_t named = 0;
  for (const PInst& inst : fn.code)
    for (const Operand& o : inst.args) {
      named += o.reg == reg;
      for (const Operand& part : o.sub) named += part.reg == reg;
    }
  return reg >= 0 && named == 1;
}

Ref Dec::srcWide(const Operand& o, Type t, unsigned* bytes) {
  unsigned want = t == Type::None ? 0 : std::max(1u, typeBytes(t));
  switch (o.kind) {
    case Operand::Register: {
      Ref r = kb.reg(fn, o.reg, bytes);
      if (*bytes == 0) fail("register ", fn.regs[(size_t)o.reg].name, " is a predicate");
      if (o.i) fail("offset on a register operand");
      return r;
    }
    case Operand::Int:
    case Operand::Float: *bytes = std::max(2u, want ? want : 4u); return constant(immediateBits(o, t, *this), *bytes);
    case Operand::Special: {
      unsigned dimension;
      const Special* special = findSpecial(o.name, &dimension);
      if (!special || !special->value) fail("special register ", o.name, " is not supported here");
      *bytes = want >= 8 ? 8 : want == 2 ? 2 : 4;
      return kb.special(*special, dimension, *bytes);
    }
    case Operand::Symbol: {
      const Var& v = *o.var;
      *bytes = want >= 8 ? 8 : 4;
      if (v.space == Space::Shared) return kb.special(kSharedAddress, 0, *bytes, kb.sharedOffset(v) + (uint32_t)o.i);
      // 32 bits hold an offset in the parameter space, which cvta.param makes an address of; 64 bits the address
      // itself.
      if (v.space == Space::Param && kb.isEntryParam(v) && *bytes == 4)
        return constant(kb.params[&v] + (uint64_t)o.i, 4);
      if (v.space == Space::Param && kb.isEntryParam(v))
        return constant((uint64_t)kb.k.params + kb.params[&v] + (uint64_t)o.i, 8);
      if (v.space == Space::Param) return constant(kLocalWindow + kb.frameOffset(v) + (uint64_t)o.i, 8);
      if (v.space == Space::Local) return constant(kb.frameOffset(v) + (uint64_t)o.i, *bytes);
      return constant(globalAddress(kb.module, const_cast<Var&>(v)) + (uint64_t)o.i, 8);
    }
    default: fail("operand is not a value");
  }
}

Ref Dec::src(const Operand& o, Type t) {
  unsigned bytes;
  Ref r = srcWide(o, t, &bytes);
  unsigned want = std::max(2u, typeBytes(t));
  if (bytes != want) {
    if (o.kind == Operand::Register)
      fail("register ", fn.regs[(size_t)o.reg].name, " has ", bytes * 8, " bits, the instruction wants ", want * 8);
    fail("operand has the wrong width");
  }
  return r;
}

Ref Dec::pred(const Operand& o) {
  bool negated;
  Ref r = pred(o, &negated);
  if (negated) r.off |= Ref::kNegated;
  return r;
}
Ref Dec::pred(const Operand& o, bool* negate) {
  if (negate)
    *negate = o.negate;
  else if (o.negate)
    fail("a negated predicate is not allowed here");
  if (o.kind == Operand::Int) return constant(o.i ? kAll : 0, 4);
  if (o.kind != Operand::Register || fn.regs[(size_t)o.reg].type != Type::Pred) fail("operand must be a predicate");
  return kb.reg(fn, o.reg, nullptr);
}

Ref Dec::predDst(const Operand& o) {
  if (o.kind == Operand::Sink) {
    Ref r{kb.k.regBytes, kb.k.numIds++};
    kb.k.regBytes += 64;
    return r;
  }
  return pred(o, nullptr);
}

Ref Dec::address(const Operand& o, int64_t* offset) {
  const Operand& b = o.kind == Operand::Address ? o.sub[0] : o;
  *offset = 0;
  if (b.kind == Operand::Register) {
    unsigned bytes;
    Ref r = kb.reg(fn, b.reg, &bytes);
    if (bytes != 4 && bytes != 8) fail("an address register has 32 or 64 bits");
    *offset = b.i;
    out.x[5] = (uint8_t)bytes;
    return r;
  }
  Operand plain = b;
  *offset = b.i;
  plain.i = 0;
  if (b.kind == Operand::Int) {
    out.x[5] = 8;
    *offset = 0;
    return constant((uint64_t)b.i, 8);
  }
  unsigned bytes;
  Ref r = srcWide(plain, Type::U64, &bytes);
  out.x[5] = (uint8_t)bytes;
  return r;
}

AddressOperand Dec::second(const Operand& o) {
  const uint8_t first = out.x[5];
  AddressOperand a;
  a.ref = address(o, &a.offset);
  a.bytes = out.x[5];
  out.x[5] = first;
  return a;
}

// ---- a kernel

static void collectCalls(const Module& m, const Func& f, std::vector<const Func*>& order,
                         std::vector<const Func*>& stack) {
  if (std::find(stack.begin(), stack.end(), &f) != stack.end())
    throw Error("recursive function '", f.name, "' is not supported");
  if (std::find(order.begin(), order.end(), &f) != order.end()) return;
  order.push_back(&f);
  stack.push_back(&f);
  for (auto& in : f.code) {
    if (in.op[0] != "call") continue;
    for (auto& a : in.args)
      if (a.kind == Operand::Name)
        if (auto it = m.funcByName.find(a.name); it != m.funcByName.end() && it->second->hasBody)
          collectCalls(m, *it->second, order, stack);
  }
  stack.pop_back();
}

static void decodeInst(Dec& d) {
  auto it = opTable().find(d.p.op[0]);
  if (it == opTable().end()) d.fail("no such instruction here");
  const Dec fresh = d;
  std::string misfit, leftOver;  // why the last form does not fit, and the first that understands all but a modifier
  for (const Form& form : it->second) {
    d.out = fresh.out, d.used = fresh.used, d.types.clear();
    misfit = d.choose(form);
    if (!misfit.empty()) continue;
    d.out.fn = form.fn;
    if (form.decode) form.decode(d);
    const size_t unknown = (size_t)(std::find(d.used.begin(), d.used.end(), false) - d.used.begin());
    if (d.out.fn && unknown == d.used.size()) return;
    if (d.out.fn && leftOver.empty()) leftOver = cat("modifier .", d.p.op[unknown], " is not supported here");
  }
  d.fail(!leftOver.empty() ? leftOver : !misfit.empty() ? misfit : "this form is not supported");
}

static void decodeFunction(KernelBuilder& kb, const Func& f) {
  Kernel& k = kb.k;
  size_t first = k.code.size();
  kb.start[&f] = (int)first;
  std::vector<bool> leader(f.code.size() + 1, false);
  if (!leader.empty()) leader[0] = true;
  for (auto& sc : f.scopes)
    for (auto& l : sc.labels) leader[(size_t)l.second] = true;
  for (size_t i = 0; i < f.code.size(); ++i) {
    const PInst& p = f.code[i];
    Dec d(kb, f, p);
    if (p.guard >= 0) {
      if (f.regs[(size_t)p.guard].type != Type::Pred) d.fail("the guard is not a predicate");
      Ref g = kb.reg(f, p.guard, nullptr);
      d.out.guard = g.off;
      d.out.guardId = g.id;
      d.out.guardNegate = p.guardNegate;
    }
    decodeInst(d);
    k.code.push_back(d.out);
    k.source.push_back({p.ptxLine, p.loc, p.text()});
    k.leader.push_back(leader[i] || (i && (f.code[i - 1].op[0] == "bra" || f.code[i - 1].op[0] == "ret" ||
                                           f.code[i - 1].op[0] == "exit")));
  }
  // Falling off the end returns.
  static const PInst kRet = [] {
    PInst r;
    r.op = {"ret"};
    return r;
  }();
  Dec d(kb, f, kRet);
  decodeInst(d);
  k.code.push_back(d.out);
  k.source.push_back({f.code.empty() ? 0 : f.code.back().ptxLine, 0, "ret"});
  k.leader.push_back(false);
}

std::unique_ptr<Kernel> decodeKernel(Module& m, Func& f) {
  auto kernel = std::make_unique<Kernel>();
  Kernel& k = *kernel;
  k.name = f.name;
  k.module = &m;
  k.func = &f;
  KernelBuilder kb(m, k);
  uint32_t off = 0;
  for (Var* p : f.params) {
    off = (off + p->align - 1) / p->align * p->align;
    kb.params[p] = off;
    k.paramLayout.emplace_back(off, (uint32_t)p->bytes);
    off += (uint32_t)p->bytes;
  }
  k.paramBytes = off;
  k.params = (uint8_t*)Arena::get().allocate(std::max(off, 1u), f.name + " parameters", false);
  // Function-scope shared variables first, in order; dynamic shared memory follows the static part.
  std::vector<const Func*> order, stack;
  collectCalls(m, f, order, stack);
  std::vector<const Var*> dynamic;
  std::vector<bool> seen;
  auto visit = [&](const Operand& o, auto&& self) -> void {
    if (o.kind == Operand::Symbol && o.var->space == Space::Shared) {
      if (o.var->isExtern) {
        if (std::find(dynamic.begin(), dynamic.end(), o.var) == dynamic.end()) dynamic.push_back(o.var);
      } else {
        kb.sharedOffset(*o.var);
      }
    }
    for (auto& s : o.sub) self(s, self);
  };
  for (auto* fn : order)
    for (auto& in : fn->code)
      for (auto& a : in.args) visit(a, visit);
  for (auto* v : dynamic) k.dynSharedAlign = std::max(k.dynSharedAlign, v->align);
  uint32_t dynStart = (kSharedReserved + k.staticShared + k.dynSharedAlign - 1) / k.dynSharedAlign * k.dynSharedAlign;
  k.staticShared = dynStart - kSharedReserved;
  for (auto* v : dynamic) {
    kb.shared[v] = dynStart;
    k.sharedVars.emplace_back(dynStart, const_cast<Var*>(v));
  }
  k.localBytes = 16;
  for (auto* fn : order) decodeFunction(kb, *fn);
  // Branches hold label positions relative to their function, calls hold functions: make both absolute.
  for (auto* fn : order) {
    int start = kb.start[fn];
    for (size_t i = 0; i < fn->code.size(); ++i) {
      Inst& in = k.code[(size_t)start + i];
      const PInst& p = fn->code[i];
      if (p.op[0] == "bra") in.imm += start;
      if (p.op[0] == "brx")
        for (auto& t : const_cast<Extra*>(in.ext)->targets) t += start;
      if (p.op[0] == "call" && in.ext)
        for (auto& a : p.args)
          if (a.kind == Operand::Name)
            if (auto it = m.funcByName.find(a.name); it != m.funcByName.end() && kb.start.count(it->second))
              in.imm = kb.start[it->second];
    }
  }
  std::vector<bool> fenced(k.numIds, false);  // registers of wgmmas
  auto each = [](const Inst& in, auto visit) {
    visit(in.d);
    if (in.ext)
      for (auto& r : in.ext->refs) visit(r);
  };
  for (auto& in : k.code)
    if (in.isWgmma && in.ext) {
      for (auto& r : in.ext->refs) fenced[r.id] = true;
      for (auto& r : in.ext->refs2) fenced[r.id] = true;
    }
  fenced[0] = false;
  for (auto& in : k.code)
    if (!in.isWgmma && !in.storesD) each(in, [&](Ref r) { in.needsFence |= fenced[r.id]; });
  k.entry = kb.start[&f];
  k.localBytes = (k.localBytes + 15) / 16 * 16;
  return kernel;
}

}  // namespace ptxsim
