// The parsed form of a PTX module: what the text says, with names resolved but instructions not yet decoded.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxsim {

// Its arguments, texts and numbers, one after the other.
template <class... Parts>
std::string cat(const Parts&... parts) {
  static_assert((!std::is_same<Parts, uint8_t>::value && ...), "it would be printed as a character");
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}
// The text up to the separator, which `text` loses with it.
inline std::string_view cut(std::string_view& text, char separator) {
  const std::string_view first = text.substr(0, text.find(separator));
  text.remove_prefix(std::min(text.size(), first.size() + 1));
  return first;
}
struct Error : std::runtime_error {
  template <class... Parts>
  explicit Error(const Parts&... parts) : std::runtime_error(cat(parts...)) {}
};

// Type, its name without the dot, bytes.
#define TYPES(X)                                                                                                      \
  X(B8, b8, 1), X(B16, b16, 2), X(B32, b32, 4), X(B64, b64, 8), X(B128, b128, 16), X(U8, u8, 1), X(U16, u16, 2),      \
      X(U32, u32, 4), X(U64, u64, 8), X(S8, s8, 1), X(S16, s16, 2), X(S32, s32, 4), X(S64, s64, 8), X(F16, f16, 2),   \
      X(F16x2, f16x2, 4), X(BF16, bf16, 2), X(BF16x2, bf16x2, 4), X(F32, f32, 4), X(F32x2, f32x2, 8), X(F64, f64, 8), \
      X(TF32, tf32, 4), X(E4M3, e4m3, 1), X(E5M2, e5m2, 1), X(E4M3x2, e4m3x2, 2), X(E5M2x2, e5m2x2, 2),               \
      X(U16x2, u16x2, 4), X(S16x2, s16x2, 4), X(Pred, pred, 4)
#define ENUMERATOR(type, name, bytes) type
enum class Type : uint8_t { None, TYPES(ENUMERATOR) };
#undef ENUMERATOR
inline unsigned typeBytes(Type t) {
#define BYTES(type, name, bytes) bytes
  constexpr uint8_t kBytes[] = {0, TYPES(BYTES)};
#undef BYTES
  return kBytes[(int)t];
}
Type typeFromName(std::string_view s);  // without the dot; None if it is no type
inline bool isSigned(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
inline bool isFloat(Type t) { return t >= Type::F16 && t <= Type::E5M2x2; }

enum class Space : uint8_t { Generic, Global, Shared, Local, Param, Const };

struct Var {
  std::string name;
  Space space = Space::Global;
  unsigned align = 1;
  uint64_t bytes = 0;
  bool isExtern = false;  // dynamic shared memory, or defined elsewhere
  std::vector<uint8_t> init;
  std::vector<std::pair<uint64_t, std::string>> relocs;  // offset in init <- address of symbol (+addend there)
  uint64_t address = 0;                                  // set when placed
};

struct Operand {
  enum Kind : uint8_t { None, Register, Special, Int, Float, Symbol, Name, Address, Vector, Sink, Pair, List };
  Kind kind = None;
  int reg = -1;        // Register: index into Func::regs
  Var* var = nullptr;  // Symbol
  std::string name;
  const struct Special* special = nullptr;
  unsigned dimension = 0;  // of a special register with coordinates
  int64_t i = 0;           // Int: value; Symbol and Address: byte offset; Float: the bits, `width` 32 or 64
  uint8_t width = 0;
  bool negate = false;       // !p
  std::vector<Operand> sub;  // Vector, Pair, List: elements; Address: base, then further operands (coordinates)
};

struct PInst {
  std::vector<Operand> guard;  // a predicate, or none
  std::string name;
  std::vector<std::string> op;  // the name split at dots
  std::vector<Operand> args;
  int ptxLine = 0, scope = 0, loc = 0;  // the last two are indices into Func::scopes and Module::locs
};

struct Func {
  std::string name;
  bool entry = false, hasBody = false;
  std::vector<Var*> params, returns;
  struct Reg {
    std::string name;
    Type type;
  };
  std::vector<Reg> regs;
  std::vector<PInst> code;  // ends with a `ret`
  struct Scope {
    int parent = -1;
    std::unordered_map<std::string, int> regs;
    std::unordered_map<std::string, Var*> vars;
    std::unordered_map<std::string, int> labels;                        // -> index of the instruction that follows
    std::unordered_map<std::string, std::vector<std::string>> targets;  // .branchtargets
  };
  std::vector<Scope> scopes;
  unsigned maxDim[3] = {0, 0, 0};  // .maxntid or .reqntid, 0: neither
  bool required = false;           // .reqntid
  unsigned maxThreads() const { return maxDim[0] * maxDim[1] * maxDim[2]; }
  unsigned maxnreg = 0;
  unsigned cluster[3] = {0, 0, 0};  // .reqnctapercluster
  template <class Table>            // what the innermost of the scopes around has by that name, or nullptr
  const typename Table::mapped_type* find(int scope, Table Scope::* table, const std::string& key) const {
    for (; scope >= 0; scope = scopes[(size_t)scope].parent) {
      const Table& here = scopes[(size_t)scope].*table;
      if (auto it = here.find(key); it != here.end()) return &it->second;
    }
    return nullptr;
  }
};

struct Loc {  // a .loc; `caller` is the position that the function it lies in was inlined at, 0 for none
  int file = 0, line = 0, column = 0, caller = 0;
};

struct Module {
  std::vector<Loc> locs = {Loc()};                  // 0: no position
  std::vector<std::unique_ptr<Var>> vars;           // and those of its functions
  std::unordered_map<std::string, Var*> varByName;  // without those
  std::vector<std::unique_ptr<Func>> funcs;
  std::unordered_map<std::string, Func*> funcByName;
  std::map<int, std::string> files;
  size_t hash = 0;                      // of the text
  std::string position(int loc) const;  // "file:line", empty if there is none
};

std::unique_ptr<Module> parse(const char* text);  // throws Error with the PTX line

}  // namespace ptxsim
