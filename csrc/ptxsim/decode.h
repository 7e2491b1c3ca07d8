// Turns parsed instructions into Inst records. Each family file adds its mnemonics to one table.
#pragma once
#include "sim.h"

namespace ptxsim {

struct Dec;
using DecodeFn = void (*)(Dec&);

// One form of an instruction, or of several ("fma|mad"): its modifiers in any order, its operands in order, and the
// handler, or the function that chooses one. Of the forms of a mnemonic the first is taken whose modifiers and number
// of operands fit. Words of the modifiers:
//   cc                 must be there (`aligned` has the whole warp come together)
//   lo|hi|wide         one of them must be there; the next of x[0], x[1], ... says which
//   ftz?   l|r?        may be there; the next x is 0 when none is, else 1, 2, ...
//   (uni)  (cta|gpu)   may be there and means nothing here, and so with all that begin with proxy in proxy*
//   space  vector      perhaps a state space -> Inst::space, x[4]; perhaps v2, v4 or v8 -> Inst::vec
//   f32                the next type is this one -> types[0], types[1], ...
//   type bits int      the next type is any, no float, an integer,
//   half float         a float of 16 bits (or two), one of 32 or 64
// and of the operands, where T is a type, the number of one of the types, or `wide`, which has twice the width of
// types[0]; types[0] if it is left out:
//   d:T                destination -> Inst::d
//   d:T|p              destination and perhaps a predicate, as in d|p -> Inst::d, ext->refs (Ref() if there is none)
//   a:T b:T c:T        source -> Inst::a, b, c
//   e:T                source -> ext->refs
//   {d:T} {e:T}        Inst::vec destinations or sources in braces -> ext->refs
//   [a] [e]            address -> Inst::a and imm, ext->second
//   imm                integer constant -> Inst::imm
//   a:T?               may be left out
// A source predicate may be negated: Warp::predicate reads it.
struct Form {
  const char *names, *modifiers = "", *operands = nullptr;  // operands nullptr: `decode` sees to them
  DecodeFn decode = nullptr;
  Handler fn = nullptr;
  Form(const char* n, DecodeFn f) : names(n), decode(f) {}
  Form(const char* n, const char* m, const char* o, DecodeFn f) : names(n), modifiers(m), operands(o), decode(f) {}
  Form(const char* n, const char* m, const char* o, Handler h) : names(n), modifiers(m), operands(o), fn(h) {}
};
using OpTable = std::unordered_map<std::string, std::vector<Form>>;
OpTable& opTable();
// A family's forms, which it adds to the table: `const Forms kForms = {{"shfl", ...}, ...};`
struct Forms {
  Forms(std::initializer_list<Form> forms);
};

struct KernelBuilder;

// One instruction being decoded. Modifiers are consumed as they are understood; one left over is an error, so that
// nothing is silently ignored.
struct Dec {
  KernelBuilder& kb;
  const Func& fn;
  const PInst& p;
  Inst out;
  std::vector<bool> used;   // per p.op part
  std::vector<Type> types;  // that the form names

  Dec(KernelBuilder& k, const Func& f, const PInst& inst) : kb(k), fn(f), p(inst), used(inst.op.size(), false) {
    used[0] = true;
  }
  template <class... Parts>
  [[noreturn]] void fail(const Parts&... what) const {
    throw Error("PTX line ", p.ptxLine, ": ", p.name, ": ", what...);
  }

  std::string choose(const Form& form);  // takes its modifiers and operands; why not, if it does not fit
  void operands(std::string_view words);
  size_t find(std::string_view mod) const;  // its index, if it is there and unused, or 0
  bool has(std::string_view mod) const { return find(mod) != 0; }
  bool take(std::string_view mod);
  int takeOneOf(std::string_view mods);  // "lo|hi": index or -1
  Type takeType();                       // next unused modifier that is a type; None if there is none
  Type needType();
  void takeSpace();  // x[4]: shared memory of any CTA of the cluster
  void takeVector();
  bool takePrefix(std::string_view prefix);  // every modifier that starts so; whether there is one
  size_t argc() const { return p.args.size(); }
  void wantArgs(size_t lo, size_t hi);
  void wantArgs(size_t n) { wantArgs(n, n); }
  const Operand& arg(size_t i) const;
  std::vector<Operand> elements(const Operand& o, size_t n) const;  // of a vector, or a single one

  Ref reg(const Operand& o, unsigned bytes);  // bytes 0: any
  unsigned regBytes(const Operand& o) const;  // of a register; 0 for a predicate and what is no register
  Ref dst(size_t i, unsigned bytes) { return dst(arg(i), bytes); }
  Ref dst(const Operand& o, unsigned bytes);  // bytes 0: any
  Ref src(size_t i, Type t) { return src(arg(i), t); }
  Ref src(const Operand& o, Type t);                       // width must match; immediates become lane vectors
  Ref srcWide(const Operand& o, Type t, unsigned* bytes);  // register may be wider than t (ld, st, cvt)
  Ref pred(const Operand& o);                              // Warp::predicate reads it
  Ref predDst(const Operand& o);
  Ref constant(uint64_t bits, unsigned bytes);
  AddressOperand address(const Operand& o);
  void setAddress(const Operand& o);  // -> out.a, imm, and x[5] the bytes of the register
  bool unknown(size_t i) const;  // a register that nothing else names: LLVM fills bytes that nobody looks at with it
  Extra* extra();
  int64_t intArg(size_t i) const;
};

struct KernelBuilder {
  Kernel& k;
  std::unordered_map<const Func*, uint32_t> start;  // code index
  std::unordered_map<const Func*, std::vector<Ref>> regs;
  std::map<std::pair<unsigned, uint64_t>, Ref> consts;  // by bytes and value
  // Offsets of dynamic and static shared variables, of locals and call parameters, and of entry parameters.
  std::unordered_map<const Var*, uint32_t> shared, frame, params;
  uint32_t sharedEnd = kSharedReserved;  // of what is placed

  explicit KernelBuilder(Kernel& kernel) : k(kernel) {}
  Ref slot(uint32_t bytes);
  Ref reg(const Func& f, int index);
  Ref special(const Special& s, unsigned dimension, unsigned bytes, uint32_t add = 0);
  uint32_t sharedOffset(const Var& v);
  uint32_t frameOffset(const Var& v);
};

uint64_t globalAddress(Module& m, Var& v);               // places the variable on first use
const Func* callee(const Module& m, const PInst& inst);  // of a call; nullptr: unknown

}  // namespace ptxsim
