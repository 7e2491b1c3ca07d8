#include "decode.h"

namespace ptxsim {

static bool dropEnd(std::string_view& text, std::string_view end) {
  if (text.size() < end.size() || text.substr(text.size() - end.size()) != end) return false;
  text.remove_suffix(end.size());
  return true;
}

OpTable& opTable() {
  static OpTable table;
  return table;
}
Forms::Forms(std::initializer_list<Form> forms) {
  for (const Form& f : forms)
    for (std::string_view names = f.names; !names.empty();) opTable()[std::string(cut(names, '|'))].push_back(f);
}

// ---- module variables

uint64_t globalAddress(Module& m, Var& v) {
  if (v.address) return v.address;
  if (v.isExtern) throw Error("variable '", v.name, "' is declared .extern and defined nowhere");
  Buffer& buffer = Arena::get().allocate(std::max<uint64_t>(v.bytes, 1), v.name);
  buffer.writable = v.space != Space::Const;
  v.address = buffer.begin;
  if (!v.init.empty()) memcpy((void*)v.address, v.init.data(), v.init.size());
  for (auto& r : v.relocs) {
    auto it = m.varByName.find(r.second);
    if (it == m.varByName.end()) throw Error("initialiser of '", v.name, "' refers to unknown '", r.second, "'");
    uint64_t value;
    memcpy(&value, (void*)(v.address + r.first), 8);
    value += globalAddress(m, *it->second);
    memcpy((void*)(v.address + r.first), &value, 8);
  }
  return v.address;
}

// ---- KernelBuilder

static uint32_t roundUp(uint32_t n, uint32_t align) { return (n + align - 1) / align * align; }

// The offset of a variable, which is placed at the end if it has none yet.
static uint32_t place(std::unordered_map<const Var*, uint32_t>& offsets, const Var& v, uint32_t& end) {
  auto [known, isNew] = offsets.try_emplace(&v, roundUp(end, v.align));
  if (isNew) end = known->second + (uint32_t)v.bytes;
  return known->second;
}
uint32_t KernelBuilder::sharedOffset(const Var& v) { return place(shared, v, sharedEnd); }
uint32_t KernelBuilder::frameOffset(const Var& v) { return place(frame, v, k.localBytes); }

Ref KernelBuilder::slot(uint32_t bytes) {
  const Ref r{k.regBytes, k.numIds++};
  k.regBytes += bytes;
  return r;
}
Ref KernelBuilder::reg(const Func& f, int index) {
  auto& table = regs[&f];
  table.resize(f.regs.size());
  Ref& r = table[(size_t)index];
  const Type t = f.regs[(size_t)index].type;
  if (!r.id) r = slot(t == Type::Pred ? 64 : std::max(2u, typeBytes(t)) * kLanes);
  return r;
}
Ref KernelBuilder::special(const Special& s, unsigned dimension, unsigned bytes, uint32_t add) {
  for (auto& u : k.specials)
    if (u.special == &s && u.dimension == dimension && u.bytes == bytes && u.add == add) return {u.off, 0};
  k.specials.push_back({&s, k.regBytes, (uint8_t)bytes, (uint8_t)dimension, add});
  k.regBytes += bytes * kLanes;
  return {k.specials.back().off, 0};
}

// ---- Dec

size_t Dec::find(std::string_view mod) const {
  for (size_t i = 1; i < p.op.size(); ++i)
    if (!used[i] && p.op[i] == mod) return i;
  return 0;
}
bool Dec::take(std::string_view mod) {
  const size_t i = find(mod);
  used[i] = true;
  return i != 0;
}
int Dec::takeOneOf(std::string_view mods) {
  for (int n = 0; !mods.empty(); ++n)
    if (take(cut(mods, '|'))) return n;
  return -1;
}

std::string Dec::choose(const Form& form) {
  static const std::pair<const char*, bool (*)(Type)> kClasses[] = {
      {"type", [](Type) { return true; }},
      {"bits", [](Type t) { return !isFloat(t); }},
      {"int", [](Type t) { return (t >= Type::U8 && t <= Type::S64) || t == Type::U16x2 || t == Type::S16x2; }},
      {"half", [](Type t) { return t >= Type::F16 && t <= Type::BF16x2; }},
      {"float", [](Type t) { return t == Type::F32 || t == Type::F64; }}};
  unsigned next = 0;
  for (std::string_view words = form.modifiers; !words.empty();) {
    std::string_view word = cut(words, ' ');
    const auto* known = std::find_if(kClasses, std::end(kClasses), [&](auto& c) { return word == c.first; });
    const Type exact = typeFromName(word);
    if (known != std::end(kClasses) || exact != Type::None) {
      const Type t = takeType();
      if (t == Type::None) return "a type is missing";
      if (exact == Type::None ? !known->second(t) : t != exact) return "this type is not supported";
      types.push_back(t);
    } else if (word == "space") {
      takeSpace();
    } else if (word == "vector") {
      takeVector();
    } else if (dropEnd(word, "*")) {
      takePrefix(word);
    } else if (word[0] == '(') {
      takeOneOf(word.substr(1, word.size() - 2));
    } else {
      const bool optional = dropEnd(word, "?"), several = word.find('|') != word.npos;
      const int which = takeOneOf(word);
      if (which < 0 && !optional) return cat(several ? "one of ." : ".", word, " is missing");
      out.convergeAll |= word == "aligned" && which == 0;
      if (optional || several) out.x[next++] = (uint8_t)(which + optional);
    }
  }
  if (!types.empty()) out.type = types[0], out.bytes = (uint8_t)typeBytes(types[0]);
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
    if (word == "[a]") setAddress(arg(i));
    if (word == "[e]") extra()->second = address(arg(i));
    if (word == "imm" || word[0] == '[') continue;
    const bool absent = dropEnd(word, "?") && i >= argc(), pair = dropEnd(word, "|p"), list = dropEnd(word, "}");
    const std::string_view slot = cut(word, ':');
    const char name = slot[list];
    const Type t = word.empty()       ? types.at(0)
                   : isdigit(word[0]) ? types.at((size_t)(word[0] - '0'))
                   : word == "wide"   ? (Type)((int)types.at(0) + 1)
                                      : typeFromName(word);
    auto ref = [&](const Operand& o) {
      if (name == 'd') return t == Type::Pred ? predDst(o) : dst(o, std::max(2u, typeBytes(t)));
      return t == Type::Pred ? pred(o) : src(o, t);
    };
    if (list) {
      out.storesD = name == 'e';
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
    if (const Type t = used[i] ? Type::None : typeFromName(p.op[i]); t != Type::None) {
      used[i] = true;
      return t;
    }
  return Type::None;
}
Type Dec::needType() {
  Type t = takeType();
  if (t == Type::None) fail("a type is missing");
  return t;
}
void Dec::takeSpace() {
  static const Space kSpaces[] = {Space::Global, Space::Shared, Space::Shared, Space::Shared, Space::Local,
                                  Space::Param,  Space::Param,  Space::Param,  Space::Const};
  out.x[4] = has("shared::cluster");
  const int i = takeOneOf("global|shared|shared::cta|shared::cluster|local|param|param::entry|param::func|const");
  if (i >= 0) out.space = kSpaces[i];
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
  if (!out.ext) out.ext = &kb.k.extras.emplace_back();
  return const_cast<Extra*>(out.ext);
}
int64_t Dec::intArg(size_t i) const {
  if (arg(i).kind != Operand::Int) fail("operand ", i, " must be an integer constant");
  return arg(i).i;
}

unsigned Dec::regBytes(const Operand& o) const {
  const Type t = o.kind == Operand::Register ? fn.regs[(size_t)o.reg].type : Type::Pred;
  return t == Type::Pred ? 0 : std::max(2u, typeBytes(t));
}

Ref Dec::constant(uint64_t bits, unsigned bytes) {
  if (bytes < 8) bits &= (1ull << (8 * bytes)) - 1;
  Ref& r = kb.consts[{bytes, bits}];
  if (r.off) return r;
  auto& pool = kb.k.constants;
  const size_t at = pool.size();
  pool.resize(at + bytes * kLanes / 8, 0);
  for (unsigned l = 0; l < kLanes; ++l) memcpy((uint8_t*)&pool[at] + l * bytes, &bits, std::min(bytes, 8u));
  return r = {(uint32_t)(at * 8) | Ref::kConstBit, 0};
}

static uint64_t immediateBits(const Operand& o, Type t, const Dec& d) {
  const bool integer = o.kind == Operand::Int;  // a value, in a float instruction
  if (!integer && o.kind != Operand::Float) d.fail("expected a constant");
  const bool asItIs = integer ? t != Type::F32 && t != Type::F64 : o.width == 32 ? t != Type::F64 : typeBytes(t) != 4;
  if (asItIs) return (uint64_t)o.i;
  const double x = integer ? (double)o.i : o.width == 32 ? f32((uint32_t)o.i) : bitsAs<double>((uint64_t)o.i);
  return t == Type::F64 ? bits(x) : bits((float)x);
}

Ref Dec::reg(const Operand& o, unsigned bytes) {
  const unsigned b = regBytes(o);
  if (b == 0) fail("register ", fn.regs[(size_t)o.reg].name, " is a predicate");
  if (bytes && b != bytes)
    fail("register ", fn.regs[(size_t)o.reg].name, " has ", b * 8, " bits, the instruction wants ", bytes * 8);
  if (o.i) fail("offset on a register operand");
  return kb.reg(fn, o.reg);
}
Ref Dec::dst(const Operand& o, unsigned bytes) {
  if (o.kind == Operand::Sink) return kb.slot(std::max(bytes, 8u) * kLanes);  // nobody reads it
  if (o.kind != Operand::Register) fail("the destination must be a register");
  return reg(o, bytes);
}

template <class F>
static void eachOperand(const std::vector<Operand>& list, const F& visit) {
  for (const Operand& o : list) {
    visit(o);
    eachOperand(o.sub, visit);
  }
}
bool Dec::unknown(size_t i) const {
  const int reg = arg(i).reg;
  size_t named = 0;
  for (const PInst& inst : fn.code) eachOperand(inst.args, [&](const Operand& o) { named += o.reg == reg; });
  return reg >= 0 && named == 1;
}

Ref Dec::srcWide(const Operand& o, Type t, unsigned* bytes) {
  unsigned want = t == Type::None ? 0 : std::max(1u, typeBytes(t));
  switch (o.kind) {
    case Operand::Register: *bytes = regBytes(o); return reg(o, 0);
    case Operand::Int:
    case Operand::Float: *bytes = std::max(2u, want ? want : 4u); return constant(immediateBits(o, t, *this), *bytes);
    case Operand::Special:
      if (o.special->changes) fail("special register ", o.name, " is not supported here");
      *bytes = want >= 8 ? 8 : want == 2 ? 2 : 4;
      return kb.special(*o.special, o.dimension, *bytes);
    case Operand::Symbol: {
      Var& v = *o.var;
      const uint64_t offset = (uint64_t)o.i;
      *bytes = want >= 8 ? 8 : 4;
      if (v.space == Space::Shared) return kb.special(kSharedAddress, 0, *bytes, kb.sharedOffset(v) + (uint32_t)offset);
      // 32 bits hold an offset in the parameter space, of which cvta.param makes the address that 64 bits hold.
      if (v.space == Space::Param && kb.params.count(&v))
        return constant((*bytes == 4 ? 0 : (uint64_t)kb.k.params) + kb.params[&v] + offset, *bytes);
      if (v.space == Space::Param) return constant(kLocalWindow + kb.frameOffset(v) + offset, 8);
      if (v.space == Space::Local) return constant(kb.frameOffset(v) + offset, *bytes);
      return constant(globalAddress(*kb.k.module, v) + offset, 8);
    }
    default: fail("operand is not a value");
  }
}

Ref Dec::src(const Operand& o, Type t) {
  const unsigned want = std::max(2u, typeBytes(t));
  if (o.kind == Operand::Register) return reg(o, want);
  unsigned bytes;
  const Ref r = srcWide(o, t, &bytes);
  if (bytes != want) fail("operand has the wrong width");
  return r;
}

Ref Dec::pred(const Operand& o) {
  if (o.kind == Operand::Int) return constant(o.i ? kAll : 0, 4);
  if (o.kind != Operand::Register || fn.regs[(size_t)o.reg].type != Type::Pred) fail("operand must be a predicate");
  Ref r = kb.reg(fn, o.reg);
  if (o.negate) r.off |= Ref::kNegated;
  return r;
}
Ref Dec::predDst(const Operand& o) {
  if (o.kind == Operand::Sink) return kb.slot(64);
  if (o.negate) fail("a negated predicate is not allowed here");
  return pred(o);
}

AddressOperand Dec::address(const Operand& o) {
  Operand base = o.kind == Operand::Address ? o.sub[0] : o;
  AddressOperand a;
  if (base.kind != Operand::Int) a.offset = std::exchange(base.i, 0);
  a.ref = srcWide(base, Type::U64, &a.bytes);
  if (a.bytes != 4 && a.bytes != 8) fail("an address register has 32 or 64 bits");
  return a;
}
void Dec::setAddress(const Operand& o) {
  const AddressOperand a = address(o);
  out.a = a.ref;
  out.imm = a.offset;
  out.x[5] = (uint8_t)a.bytes;
}

// ---- a kernel

const Func* callee(const Module& m, const PInst& inst) {
  for (auto& a : inst.args)
    if (a.kind == Operand::Name)
      if (auto it = m.funcByName.find(a.name); it != m.funcByName.end()) return it->second;
  return nullptr;
}

static void collectCalls(const Module& m, const Func& f, std::vector<const Func*>& order,
                         std::vector<const Func*>& stack) {
  if (std::find(stack.begin(), stack.end(), &f) != stack.end())
    throw Error("recursive function '", f.name, "' is not supported");
  if (std::find(order.begin(), order.end(), &f) != order.end()) return;
  order.push_back(&f);
  stack.push_back(&f);
  for (auto& in : f.code)
    if (const Func* called = in.op[0] == "call" ? callee(m, in) : nullptr; called && called->hasBody)
      collectCalls(m, *called, order, stack);
  stack.pop_back();
}

static Inst decodeInst(KernelBuilder& kb, const Func& f, const PInst& p) {
  auto it = opTable().find(p.op[0]);
  if (it == opTable().end()) Dec(kb, f, p).fail("no such instruction here");
  std::string misfit, leftOver;  // why the last form does not fit, and the first that understands all but a modifier
  for (const Form& form : it->second) {
    Dec d(kb, f, p);
    misfit = d.choose(form);
    if (!misfit.empty()) continue;
    d.out.fn = form.fn;
    if (form.decode) form.decode(d);
    const size_t unknown = (size_t)(std::find(d.used.begin(), d.used.end(), false) - d.used.begin());
    if (d.out.fn && unknown == d.used.size()) {
      for (auto& guard : p.guard) d.out.guard = d.pred(guard);
      return d.out;
    }
    if (d.out.fn && leftOver.empty()) leftOver = cat("modifier .", p.op[unknown], " is not supported here");
  }
  Dec(kb, f, p).fail(!leftOver.empty() ? leftOver : !misfit.empty() ? misfit : "this form is not supported");
}

static void decodeFunction(KernelBuilder& kb, const Func& f) {
  Kernel& k = kb.k;
  const size_t start = k.code.size(), last = f.code.size() - 1;
  k.leader.resize(start + f.code.size());
  auto lead = [&](size_t i) { k.leader[start + i] = i < last; };  // the `ret` at the end belongs to what is before it
  lead(0);
  for (auto& scope : f.scopes)
    for (auto& label : scope.labels) lead((size_t)label.second);
  for (size_t i = 0; i <= last; ++i) {
    const PInst& p = f.code[i];
    k.code.push_back(decodeInst(kb, f, p));
    k.source.push_back(&p);
    if (i < last && (p.op[0] == "bra" || p.op[0] == "ret" || p.op[0] == "exit")) lead(i + 1);
  }
}

std::unique_ptr<Kernel> decodeKernel(Module& m, Func& f) {
  auto kernel = std::make_unique<Kernel>();
  Kernel& k = *kernel;
  k.name = f.name;
  k.module = &m;
  KernelBuilder kb(k);
  for (Var* p : f.params) k.paramLayout.emplace_back(place(kb.params, *p, k.paramBytes), (uint32_t)p->bytes);
  Buffer& parameters = Arena::get().allocate(std::max(k.paramBytes, 1u), f.name + " parameters");
  parameters.writable = false;
  k.params = (uint8_t*)parameters.begin;
  // Function-scope shared variables first, in order; dynamic shared memory follows the static part.
  std::vector<const Func*> order, stack;
  collectCalls(m, f, order, stack);
  std::vector<const Var*> dynamic;
  uint32_t start = 0, align = 16;
  for (auto* fn : order) {
    kb.start[fn] = start;
    start += (uint32_t)fn->code.size();
    for (auto& in : fn->code)
      eachOperand(in.args, [&](const Operand& o) {
        if (o.kind != Operand::Symbol || o.var->space != Space::Shared) return;
        if (!o.var->isExtern) return (void)kb.sharedOffset(*o.var);
        align = std::max(align, o.var->align);
        dynamic.push_back(o.var);
      });
  }
  const uint32_t dynamicStart = roundUp(kb.sharedEnd, align);
  k.staticShared = dynamicStart - kSharedReserved;
  for (auto* v : dynamic) kb.shared[v] = dynamicStart;
  for (auto* fn : order) decodeFunction(kb, *fn);
  // What writes a register of a wgmma must wait for wgmma.fence.
  std::vector<bool> fenced(k.numIds, false);
  for (auto& in : k.code)
    if (in.isWgmma && in.ext)
      for (auto* refs : {&in.ext->refs, &in.ext->refs2})
        for (auto& r : *refs) fenced[r.id] = true;
  fenced[0] = false;
  for (auto& in : k.code)
    if (!in.isWgmma) in.eachDestination([&](Ref r) { in.needsFence |= fenced[r.id]; });
  k.localBytes = roundUp(k.localBytes, 16);
  return kernel;
}

}  // namespace ptxsim
