#include <array>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "sim.h"

namespace ptxsim {
namespace {

struct TypeInfo {
  const char* name;
  unsigned bytes;
};
const TypeInfo kTypes[] = {{"", 0},       {"b8", 1},     {"b16", 2},   {"b32", 4},   {"b64", 8},  {"b128", 16},
                           {"u8", 1},     {"u16", 2},    {"u32", 4},   {"u64", 8},   {"s8", 1},   {"s16", 2},
                           {"s32", 4},    {"s64", 8},    {"f16", 2},   {"f16x2", 4}, {"bf16", 2}, {"bf16x2", 4},
                           {"f32", 4},    {"f32x2", 8},  {"f64", 8},   {"tf32", 4},  {"e4m3", 1}, {"e5m2", 1},
                           {"e4m3x2", 2}, {"e5m2x2", 2}, {"u16x2", 4}, {"s16x2", 4}, {"pred", 4}};

struct Token {
  enum Kind { End, Ident, Number, String, Punct } kind = End;
  std::string s;
  int line = 0;
};

bool isIdent(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }

class Parser {
 public:
  Parser(const char* text, size_t size) : p_(text), end_(text + size), module_(new Module) { advance(); }

  std::unique_ptr<Module> run() {
    while (tok_.kind != Token::End) topLevel();
    return std::move(module_);
  }

 private:
  const char *p_, *end_;
  int line_ = 1;
  Token tok_;
  std::unique_ptr<Module> module_;
  Func* fn_ = nullptr;
  int scope_ = 0;
  int loc_ = 0;
  std::map<std::array<int, 3>, int> located_;  // the last .loc of each position

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... what) const {
    throw Error("PTX line ", tok_.line, ": ", what...);
  }

  // ---- lexer. An identifier keeps dots and :: that join its parts, so that an opcode is one token.
  void advance() {
    for (;;) {
      while (p_ < end_ && isspace((unsigned char)*p_)) line_ += *p_++ == '\n';
      if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '/') {
        while (p_ < end_ && *p_ != '\n') ++p_;
      } else if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '*') {
        for (p_ += 2; p_ + 1 < end_ && !(p_[0] == '*' && p_[1] == '/'); ++p_) line_ += *p_ == '\n';
        p_ += 2;
      } else {
        break;
      }
    }
    tok_.line = line_;
    tok_.s.clear();
    if (p_ >= end_ || *p_ == 0) {
      tok_.kind = Token::End;
      return;
    }
    char c = *p_;
    if (isdigit((unsigned char)c)) {
      tok_.kind = Token::Number;
      while (p_ < end_ && (isalnum((unsigned char)*p_) || *p_ == '.' || *p_ == '_' ||
                           ((*p_ == '+' || *p_ == '-') && (p_[-1] == 'e' || p_[-1] == 'E') && !isHexNumber())))
        tok_.s += *p_++;
    } else if (isIdent(c) || (c == '.' && p_ + 1 < end_ && isIdent(p_[1]))) {
      tok_.kind = Token::Ident;
      tok_.s += *p_++;
      while (p_ < end_) {
        if (isIdent(*p_)) {
          tok_.s += *p_++;
        } else if (*p_ == '.' && p_ + 1 < end_ && isIdent(p_[1])) {
          tok_.s += *p_++;
        } else if (p_ + 2 < end_ && p_[0] == ':' && p_[1] == ':' && isIdent(p_[2])) {
          tok_.s += "::";
          p_ += 2;
        } else {
          break;
        }
      }
    } else if (c == '"') {
      tok_.kind = Token::String;
      for (++p_; p_ < end_ && *p_ != '"'; ++p_) tok_.s += *p_;
      ++p_;
    } else {
      tok_.kind = Token::Punct;
      tok_.s = std::string(1, c);
      ++p_;
    }
  }
  bool isHexNumber() const { return tok_.s.size() > 1 && tok_.s[0] == '0' && strchr("xXfFdD", tok_.s[1]); }
  bool is(const char* s) const { return tok_.kind != Token::String && tok_.s == s; }
  bool accept(const char* s) {
    if (!is(s)) return false;
    advance();
    return true;
  }
  void expect(const char* s) {
    if (!accept(s)) fail("expected '", s, "', found '", tok_.s, "'");
  }
  std::string ident() {
    if (tok_.kind != Token::Ident) fail("expected a name, found '", tok_.s, "'");
    std::string s = tok_.s;
    advance();
    return s;
  }
  static int64_t toInt(std::string s) {
    while (!s.empty() && (s.back() == 'U' || s.back() == 'u')) s.pop_back();
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B'))
      return (int64_t)strtoull(s.c_str() + 2, nullptr, 2);
    return (int64_t)strtoull(s.c_str(), nullptr, 0);
  }
  int64_t integer() {
    bool neg = accept("-");
    if (tok_.kind != Token::Number) fail("expected a number, found '", tok_.s, "'");
    int64_t v = toInt(tok_.s);
    advance();
    return neg ? -v : v;
  }
  static bool isFloatText(const std::string& s) {
    if (s.size() > 1 && s[0] == '0' && strchr("fFdD", s[1])) return true;
    if (s.size() > 1 && s[0] == '0' && strchr("xXbB", s[1])) return false;
    return s.find_first_of(".eE") != std::string::npos;
  }
  static void parseFloat(const std::string& s, uint64_t* bits, uint8_t* width) {
    if (s[0] == '0' && s.size() > 1 && strchr("fF", s[1])) {
      *bits = strtoull(s.c_str() + 2, nullptr, 16);
      *width = 32;
    } else if (s[0] == '0' && s.size() > 1 && strchr("dD", s[1])) {
      *bits = strtoull(s.c_str() + 2, nullptr, 16);
      *width = 64;
    } else {
      double d = strtod(s.c_str(), nullptr);
      memcpy(bits, &d, 8);
      *width = 64;
    }
  }

  // ---- module level
  void skipBraces() {
    for (int depth = 0;;) {
      if (tok_.kind == Token::End) fail("unbalanced braces");
      if (is("{")) ++depth;
      bool close = is("}");
      advance();
      if (close && --depth == 0) return;
    }
  }
  void skipStatement() {
    while (tok_.kind != Token::End && !is(";")) advance();
    accept(";");
  }

  void topLevel() {
    if (accept(";")) return;
    if (is(".version") || is(".address_size")) {
      advance();
      advance();
      return;
    }
    if (accept(".target")) {
      module_->target = ident();
      while (accept(",")) ident();
      return;
    }
    if (accept(".file")) {
      int id = (int)integer();
      module_->files[id] = tok_.s;
      advance();
      while (accept(",")) advance();
      return;
    }
    if (accept(".section")) {
      while (!is("{")) advance();
      skipBraces();
      return;
    }
    if (is(".pragma") || is(".alias") || is(".noreturn")) {
      skipStatement();
      return;
    }
    bool isExtern = false;
    for (;;) {
      if (accept(".visible") || accept(".weak") || accept(".common")) {
      } else if (accept(".extern")) {
        isExtern = true;
      } else {
        break;
      }
    }
    if (is(".entry") || is(".func")) {
      function();
    } else if (Space s; spaceDirective(&s)) {
      variable(s, isExtern, nullptr);
      expect(";");
    } else {
      fail("unknown directive '", tok_.s, "'");
    }
  }

  bool spaceDirective(Space* s) {
    static const std::pair<const char*, Space> kSpaces[] = {{".global", Space::Global},
                                                            {".const", Space::Const},
                                                            {".shared", Space::Shared},
                                                            {".local", Space::Local},
                                                            {".param", Space::Param}};
    for (auto& k : kSpaces)
      if (is(k.first)) {
        advance();
        *s = k.second;
        return true;
      }
    return false;
  }

  // .global .align 1 .b8 name[7] = {...}   (the space directive is already read; the terminator is left)
  Var* variable(Space space, bool isExtern, Func* fn) {
    auto v = std::make_unique<Var>();
    v->space = space;
    v->isExtern = isExtern;
    Type type = Type::None;
    unsigned vec = 1;
    while (tok_.kind == Token::Ident && tok_.s[0] == '.') {
      std::string d = ident().substr(1);
      // `.param .u64 .ptr .global .align 16 name`: the attributes of the pointer are not ours
      if (d == "align") {
        unsigned a = (unsigned)integer();
        if (v->align == 1 || type == Type::None) v->align = a;
      } else if (d == "v2" || d == "v4" || d == "v8") {
        vec = (unsigned)(d[1] - '0');
      } else if (d == "ptr" || d == "global" || d == "const" || d == "shared" || d == "local" || d == "generic") {
      } else if (d == "attribute") {
        expect("(");
        while (!accept(")")) advance();
      } else {
        type = typeFromName(d);
        if (type == Type::None) fail("unknown type '.", d, "'");
      }
    }
    v->name = ident();
    uint64_t elem = (uint64_t)typeBytes(type) * vec, count = 1;
    bool open = false;
    while (accept("[")) {
      if (is("]"))
        open = true;
      else
        count *= (uint64_t)integer();
      expect("]");
    }
    if (v->align < elem && v->align == 1) v->align = (unsigned)elem;
    v->bytes = open ? 0 : elem * count;
    if (open && space == Space::Shared) v->isExtern = true;
    if (accept("=")) {
      initializer(*v, type);
      if (open) v->bytes = v->init.size();
      v->init.resize(v->bytes);
    }
    Var* raw = v.get();
    if (fn) {
      fn->vars.push_back(std::move(v));
      fn->scopes[(size_t)scope_].vars[raw->name] = raw;
    } else {
      module_->varByName[raw->name] = raw;
      module_->vars.push_back(std::move(v));
    }
    return raw;
  }
  void appendBits(Var& v, uint64_t bits, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) v.init.push_back((uint8_t)(bits >> (8 * i)));
  }
  void initializer(Var& v, Type type) {
    unsigned bytes = typeBytes(type);
    if (accept("{")) {
      while (!accept("}")) {
        initializer(v, type);
        accept(",");
      }
      return;
    }
    if (tok_.kind == Token::Number || is("-")) {
      bool neg = accept("-");
      std::string s = tok_.s;
      advance();
      if (isFloatText(s)) {
        uint64_t bits;
        uint8_t w;
        parseFloat(s, &bits, &w);
        if (w == 64 && bytes == 4) {
          double d;
          memcpy(&d, &bits, 8);
          float f = (float)(neg ? -d : d);
          bits = 0;
          memcpy(&bits, &f, 4);
        }
        appendBits(v, bits, bytes);
      } else {
        int64_t i = toInt(s);
        appendBits(v, (uint64_t)(neg ? -i : i), bytes);
      }
      return;
    }
    std::string name = ident();  // symbol, generic(symbol), symbol+offset
    if (name == "generic") {
      expect("(");
      name = ident();
      expect(")");
    }
    int64_t add = 0;
    if (accept("+")) add = integer();
    v.relocs.emplace_back(v.init.size(), name);
    appendBits(v, (uint64_t)add, bytes);
  }

  // ---- functions
  void function() {
    bool entry = ident() == ".entry";
    auto f = std::make_unique<Func>();
    f->entry = entry;
    f->scopes.emplace_back();
    Func* saved = fn_;
    fn_ = f.get();
    located_.clear();
    loc_ = 0;
    scope_ = 0;
    if (is("(")) paramList(f->returns);
    f->name = ident();
    if (is("(")) paramList(f->params);
    while (!is("{") && !is(";")) {
      std::string d = ident();
      if (d == ".maxntid" || d == ".reqntid") {
        unsigned n = 0;
        f->maxThreads = 1;
        do {
          f->maxDim[n] = (unsigned)integer();
          f->maxThreads *= f->maxDim[n++];
        } while (accept(","));
        for (; n < 3; ++n) f->maxDim[n] = 1;
        f->required = d == ".reqntid";
      } else if (d == ".maxnreg") {
        f->maxnreg = (unsigned)integer();
      } else if (d == ".minnctapersm" || d == ".maxclusterrank" || d == ".maxnctapersm") {
        integer();
      } else if (d == ".reqnctapercluster") {
        unsigned n = 0;
        do f->cluster[n++] = (unsigned)integer();
        while (accept(","));
        for (; n < 3; ++n) f->cluster[n] = 1;
      } else if (d == ".explicitcluster" || d == ".blocksareclusters" || d == ".noreturn" || d == ".unique") {
      } else if (d == ".pragma" || d == ".abi_preserve" || d == ".abi_preserve_control") {
        advance();
        accept(";");
      } else {
        fail("unknown function directive '", d, "'");
      }
    }
    if (!accept(";")) {
      expect("{");
      f->hasBody = true;
      body();
    }
    fn_ = saved;
    auto old = module_->funcByName.find(f->name);
    if (old == module_->funcByName.end() || f->hasBody) module_->funcByName[f->name] = f.get();
    module_->funcs.push_back(std::move(f));
  }
  void paramList(std::vector<Var*>& list) {
    expect("(");
    while (!accept(")")) {
      if (accept(".reg")) {
        fail("functions with .reg parameters are not supported");
      }
      expect(".param");
      list.push_back(variable(Space::Param, false, fn_));
      accept(",");
    }
  }

  void body() {
    int depth = 1;
    while (depth) {
      if (tok_.kind == Token::End) fail("end of file inside a function");
      if (accept("{")) {
        ++depth;
        fn_->scopes.emplace_back();
        fn_->scopes.back().parent = scope_;
        scope_ = (int)fn_->scopes.size() - 1;
      } else if (accept("}")) {
        --depth;
        if (depth) scope_ = fn_->scopes[(size_t)scope_].parent;
      } else if (accept(";")) {
      } else if (tok_.kind == Token::Ident && tok_.s[0] == '.') {
        directive();
      } else {
        instruction();
      }
    }
  }

  int addLoc(const Loc& l) {
    int& at = located_[{l.file, l.line, l.column}];
    if (!at || module_->locs[(size_t)at].caller != l.caller) {
      module_->locs.push_back(l);
      at = (int)module_->locs.size() - 1;
    }
    return at;
  }
  void directive() {
    if (accept(".loc")) {
      auto position = [&] {
        Loc l;
        l.file = (int)integer();
        l.line = (int)integer();
        l.column = (int)integer();
        return l;
      };
      Loc here = position();
      while (accept(",")) {  // function_name label+off, inlined_at f l c
        if (ident() == "function_name") {
          ident();
          if (accept("+")) integer();
        } else {
          const Loc at = position();
          auto it = located_.find({at.file, at.line, at.column});
          here.caller = it != located_.end() ? it->second : addLoc(at);
        }
      }
      loc_ = addLoc(here);
      return;
    }
    if (accept(".reg")) {
      Type t = Type::None;
      while (tok_.kind == Token::Ident && tok_.s[0] == '.') t = typeFromName(ident().substr(1));
      if (t == Type::None) fail("unknown register type");
      do {
        std::string name = ident();
        if (accept("<")) {
          int n = (int)integer();
          expect(">");
          fn_->scopes[(size_t)scope_].ranges[name] = {t, n};
        } else {
          fn_->scopes[(size_t)scope_].regs[name] = (int)fn_->regs.size();
          fn_->regs.push_back({name, t});
        }
      } while (accept(","));
      expect(";");
      return;
    }
    if (Space s; spaceDirective(&s)) {
      variable(s, false, fn_);
      while (accept(",")) fail("several variables in one declaration");
      expect(";");
      return;
    }
    if (is(".pragma")) {
      skipStatement();
      return;
    }
    fail("unknown directive '", tok_.s, "'");
  }

  int findReg(const std::string& name) {
    size_t digits = name.size();
    while (digits > 0 && isdigit((unsigned char)name[digits - 1])) --digits;
    for (int s = scope_; s >= 0; s = fn_->scopes[(size_t)s].parent) {
      auto& sc = fn_->scopes[(size_t)s];
      if (auto it = sc.regs.find(name); it != sc.regs.end()) return it->second;
      // every split of prefix and number is a candidate: %r1<5> declares %r10
      for (size_t cut = digits; cut < name.size(); ++cut) {
        auto it = sc.ranges.find(name.substr(0, cut));
        if (it == sc.ranges.end()) continue;
        std::string num = name.substr(cut);
        if ((num.size() > 1 && num[0] == '0') || atoi(num.c_str()) >= it->second.second) continue;
        int id = (int)fn_->regs.size();
        fn_->regs.push_back({name, it->second.first});
        sc.regs[name] = id;
        return id;
      }
    }
    return -1;
  }
  Var* findVar(const std::string& name, bool* local) {
    for (int s = scope_; s >= 0; s = fn_->scopes[(size_t)s].parent) {
      auto& sc = fn_->scopes[(size_t)s];
      if (auto it = sc.vars.find(name); it != sc.vars.end()) {
        *local = true;
        return it->second;
      }
    }
    *local = false;
    auto it = module_->varByName.find(name);
    return it == module_->varByName.end() ? nullptr : it->second;
  }
  Operand operand() {
    Operand o;
    if (accept("!")) {
      o = operand();
      o.negate = true;
      return o;
    }
    if (accept("{")) {
      o.kind = Operand::Vector;
      while (!accept("}")) {
        o.sub.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::Address;
      do o.sub.push_back(operand());
      while (accept(","));
      expect("]");
      return o;
    }
    if (accept("(")) {
      o.kind = Operand::List;
      while (!accept(")")) {
        o.sub.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (tok_.kind == Token::Number || is("-")) {
      bool neg = accept("-");
      std::string s = tok_.s;
      advance();
      if (isFloatText(s)) {
        o.kind = Operand::Float;
        parseFloat(s, &o.bits, &o.width);
        if (neg) o.bits ^= o.width == 32 ? 0x80000000ull : 0x8000000000000000ull;
      } else {
        o.kind = Operand::Int;
        o.i = toInt(s);
        if (neg) o.i = -o.i;
      }
      return o;
    }
    std::string name = ident();
    if (name == "_") {
      o.kind = Operand::Sink;
    } else if (int r = findReg(name); r >= 0) {
      o.kind = Operand::Register;
      o.reg = r;
    } else if (unsigned d; findSpecial(name, &d)) {
      o.kind = Operand::Special;
      o.name = name;
    } else {
      bool local = false;
      if (Var* v = findVar(name, &local)) {
        o.kind = Operand::Symbol;
        o.var = v;
        o.funcVar = local;
      } else {
        if (name[0] == '%') fail("register '", name, "' is not declared");
        o.kind = Operand::Name;
        o.name = name;
      }
    }
    if (is("+") || is("-")) {  // reg+imm, sym+imm; "+-16" occurs
      bool neg = is("-");
      advance();
      int64_t v = integer();
      o.i = neg ? -v : v;
    }
    if (accept("|")) {
      Operand pair;
      pair.kind = Operand::Pair;
      pair.sub.push_back(o);
      pair.sub.push_back(operand());
      return pair;
    }
    return o;
  }

  void instruction() {
    PInst in;
    in.ptxLine = tok_.line;
    in.scope = scope_;
    in.loc = loc_;
    if (accept("@")) {
      in.guardNegate = accept("!");
      std::string name = ident();
      in.guard = findReg(name);
      if (in.guard < 0) fail("predicate '", name, "' is not declared");
    }
    std::string name = ident();
    if (accept(":")) {  // label, or `label: .branchtargets a, b;`
      if (is(".branchtargets")) {
        advance();
        std::vector<std::string> list;
        do list.push_back(ident());
        while (accept(","));
        expect(";");
        fn_->scopes[(size_t)scope_].targets[name] = list;
      } else if (is(".callprototype") || is(".calltargets")) {
        skipStatement();
      } else {
        fn_->scopes[(size_t)scope_].labels[name] = (int)fn_->code.size();
      }
      return;
    }
    for (size_t a = 0; a <= name.size();) {
      size_t b = name.find('.', a);
      if (b == std::string::npos) b = name.size();
      in.op.push_back(name.substr(a, b - a));
      a = b + 1;
    }
    while (!accept(";")) {
      in.args.push_back(operand());
      if (!is(";")) expect(",");
    }
    fn_->code.push_back(std::move(in));
  }
};

}  // namespace

unsigned typeBytes(Type t) { return kTypes[(int)t].bytes; }
const char* typeName(Type t) { return kTypes[(int)t].name; }
Type typeFromName(const std::string& s) {
  static const auto* map = [] {
    auto* m = new std::unordered_map<std::string, Type>;
    for (size_t i = 1; i < sizeof kTypes / sizeof *kTypes; ++i) (*m)[kTypes[i].name] = (Type)i;
    return m;
  }();
  auto it = map->find(s);
  return it == map->end() ? Type::None : it->second;
}

std::string PInst::text() const {
  std::string s;
  for (auto& part : op) s += (s.empty() ? "" : ".") + part;
  return s;
}

std::string Module::position(int loc) const {
  const Loc& l = locs[(size_t)loc];
  auto it = files.find(l.file);
  return l.line && it != files.end() ? it->second + ":" + std::to_string(l.line) : "";
}

int Func::findLabel(int scope, const std::string& label) const {
  for (int s = scope; s >= 0; s = scopes[(size_t)s].parent)
    if (auto it = scopes[(size_t)s].labels.find(label); it != scopes[(size_t)s].labels.end()) return it->second;
  return -1;
}
const std::vector<std::string>* Func::findTargets(int scope, const std::string& label) const {
  for (int s = scope; s >= 0; s = scopes[(size_t)s].parent)
    if (auto it = scopes[(size_t)s].targets.find(label); it != scopes[(size_t)s].targets.end()) return &it->second;
  return nullptr;
}

std::unique_ptr<Module> parse(const char* text, size_t size) {
  std::unique_ptr<Module> m = Parser(text, size).run();
  m->hash = std::hash<std::string_view>()({text, size});
  return m;
}

}  // namespace ptxsim
