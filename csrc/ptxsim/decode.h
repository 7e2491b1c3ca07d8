// Turns parsed instructions into Inst records. Each family file adds its mnemonics to one table.
#pragma once
#include "sim.h"

namespace ptxsim {

struct Dec;
using DecodeFn = void (*)(Dec&);
using OpTable = std::unordered_map<std::string, DecodeFn>;
const OpTable& opTable();
void addIntegerOps(OpTable&);
void addFloatOps(OpTable&);
void addConvertOps(OpTable&);
void addLogicOps(OpTable&);
void addMemoryOps(OpTable&);
void addAtomicOps(OpTable&);
void addWarpOps(OpTable&);
void addControlOps(OpTable&);
void addBarrierOps(OpTable&);
void addAsyncOps(OpTable&);
void addTmaOps(OpTable&);
void addMatrixOps(OpTable&);
void addWgmmaOps(OpTable&);

struct KernelBuilder;

// One instruction being decoded. Modifiers are consumed as they are understood; one left over is an error, so that
// nothing is silently ignored.
struct Dec {
  KernelBuilder& kb;
  const Func& fn;
  const PInst& p;
  Inst out;
  std::vector<bool> used;  // per p.op part

  Dec(KernelBuilder& k, const Func& f, const PInst& inst) : kb(k), fn(f), p(inst), used(inst.op.size(), false) {
    used[0] = true;
  }
  template <class... Parts>
  [[noreturn]] void fail(const Parts&... what) const {
    throw Error("PTX line ", p.ptxLine, ": ", p.text(), ": ", what...);
  }
  bool has(const char* mod) const;
  bool take(const char* mod);
  int takeOneOf(std::initializer_list<const char*> mods);  // index or -1
  Type takeType();                                         // next unused modifier that is a type; None if there is none
  Type needType();
  void takePrefix(const char* prefix);  // drop every unused modifier that starts so
  size_t argc() const { return p.args.size(); }
  void wantArgs(size_t lo, size_t hi);
  const Operand& arg(size_t i) const;

  unsigned regBytes(const Operand& o) const;  // register bytes, 0 if it is no register
  Ref dst(size_t i, unsigned bytes) { return dst(arg(i), bytes); }
  Ref dst(const Operand& o, unsigned bytes);  // bytes 0: any
  Ref src(size_t i, Type t) { return src(arg(i), t); }
  Ref src(const Operand& o, Type t);                       // width must match; immediates become lane vectors
  Ref srcWide(const Operand& o, Type t, unsigned* bytes);  // register may be wider than t (ld, st, cvt)
  Ref pred(const Operand& o, bool* negate);
  Ref predDst(const Operand& o);
  Ref constant(uint64_t bits, unsigned bytes);
  Ref address(const Operand& o, int64_t* offset);  // base as 64-bit lanes or 32-bit lanes; out.x[5] = base bytes
  bool unknown(size_t i) const;  // a register that nothing else names: LLVM fills bytes that nobody looks at with it
  Extra* extra();
  int64_t intArg(size_t i) const;
};

struct KernelBuilder {
  Module& module;
  Kernel& k;
  std::vector<const Func*> functions;              // reached, in code order
  std::unordered_map<const Func*, int> start;      // code index of each
  std::unordered_map<const Var*, uint32_t> frame;  // local-frame offset of locals and call parameters
  struct Placed {
    uint32_t off, id;
    unsigned bytes;
  };
  std::unordered_map<const Func*, std::vector<Placed>> regs;
  std::unordered_map<std::string, Ref> consts;
  std::unordered_map<const Var*, uint32_t> shared;
  std::unordered_map<const Var*, uint32_t> params;  // entry parameters

  KernelBuilder(Module& m, Kernel& kernel) : module(m), k(kernel) {}
  Ref reg(const Func& f, int index, unsigned* bytes);
  Ref special(const Special& s, unsigned dimension, unsigned bytes, uint32_t add = 0);
  uint32_t sharedOffset(const Var& v);
  uint32_t frameOffset(const Var& v);
  bool isEntryParam(const Var& v) const { return params.count(&v) != 0; }
};

uint64_t immediateBits(const Operand& o, Type t, const Dec& d);
uint64_t globalAddress(Module& m, Var& v);  // places the variable on first use

}  // namespace ptxsim
