#include "sim.h"

namespace ptxsim {
namespace {

bool isIdent(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }

class Parser {
 public:
  explicit Parser(const char* text) : p_(text), module_(new Module) {
    module_->hash = std::hash<std::string_view>()(text);
    advance();
  }
  std::unique_ptr<Module> run() {
    while (kind_ != End) topLevel();
    return std::move(module_);
  }

 private:
  const char* p_;  // behind the token, in a text that ends with a zero
  enum { End, Ident, Number, String, Other } kind_ = End;
  std::string text_;
  int line_ = 1;
  std::unique_ptr<Module> module_;
  Func* fn_ = nullptr;
  int scope_ = -1;  // -1: outside functions
  int loc_ = 0;
  std::map<std::array<int, 3>, int> located_;  // the last .loc of each position

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... what) const {
    throw Error("PTX line ", line_, ": ", what...);
  }
  Func::Scope& scope() { return fn_->scopes[(size_t)scope_]; }

  // ---- lexer. An identifier keeps dots and :: that join its parts, so that an opcode is one token.
  static size_t blank(const char* p) {  // the length of the white space or comment there
    if (!strncmp(p, "//", 2)) return strcspn(p, "\n");
    if (strncmp(p, "/*", 2)) return strspn(p, " \t\r\n\v\f");
    const char* end = strstr(p + 2, "*/");
    return end ? (size_t)(end + 2 - p) : strlen(p);
  }
  void advance() {
    for (size_t n; (n = blank(p_)); p_ += n) line_ += (int)std::count(p_, p_ + n, '\n');
    const char* start = p_;
    if (!*p_) {
      kind_ = End;
    } else if (isdigit((unsigned char)*p_)) {
      kind_ = Number;
      const bool hex = p_[0] == '0' && strchr("xXfFdD", p_[1]);
      auto isSign = [&] { return (*p_ == '+' || *p_ == '-') && (p_[-1] == 'e' || p_[-1] == 'E') && !hex; };
      while (isalnum((unsigned char)*p_) || *p_ == '.' || *p_ == '_' || isSign()) ++p_;
    } else if (isIdent(*p_) || (*p_ == '.' && isIdent(p_[1]))) {
      kind_ = Ident;
      while (isIdent(*p_) || (*p_ == '.' && isIdent(p_[1])) || (p_[0] == ':' && p_[1] == ':' && isIdent(p_[2])))
        p_ += *p_ == ':' ? 2 : 1;
    } else if (*p_ == '"') {
      kind_ = String;
      ++start;
      p_ = start + strcspn(start, "\"");
    } else {
      kind_ = Other;
      ++p_;
    }
    text_.assign(start, p_);
    p_ += kind_ == String && *p_;
  }
  bool is(const char* s) const { return kind_ != String && text_ == s; }
  bool isDirective() const { return kind_ == Ident && text_[0] == '.'; }
  bool accept(const char* s) {
    if (!is(s)) return false;
    advance();
    return true;
  }
  bool acceptOneOf(std::initializer_list<const char*> list) {
    return std::any_of(list.begin(), list.end(), [&](const char* s) { return accept(s); });
  }
  void expect(const char* s) {
    if (!accept(s)) fail("expected '", s, "', found '", text_, "'");
  }
  std::string ident() {
    if (kind_ != Ident) fail("expected a name, found '", text_, "'");
    std::string s = text_;
    advance();
    return s;
  }
  template <class F>
  void listUntil(const char* close, F item) {
    while (!accept(close)) {
      item();
      if (!is(close)) expect(",");
    }
  }
  bool isNumber() const { return kind_ == Number || is("-"); }
  Operand number() {
    const bool negative = accept("-");
    if (kind_ != Number) fail("expected a number, found '", text_, "'");
    const char* s = text_.c_str();
    const int prefix = s[0] == '0' ? tolower(s[1]) : 0;
    Operand o;
    if (prefix == 'f' || prefix == 'd' || (prefix != 'x' && prefix != 'b' && strpbrk(s, ".eE"))) {
      o.kind = Operand::Float;
      o.width = prefix == 'f' ? 32 : 64;
      const bool hex = prefix == 'f' || prefix == 'd';
      o.i = (int64_t)(hex ? strtoull(s + 2, nullptr, 16) : bits(strtod(s, nullptr)));
      if (negative) o.i ^= 1ll << (o.width - 1);
    } else {
      o.kind = Operand::Int;
      const uint64_t v = prefix == 'b' ? strtoull(s + 2, nullptr, 2) : strtoull(s, nullptr, 0);
      o.i = (int64_t)(negative ? 0 - v : v);
    }
    advance();
    return o;
  }
  int64_t integer() { return number().i; }
  void dimensions(unsigned (&to)[3]) {
    std::fill_n(to, 3, 1u);
    unsigned n = 0;
    do to[n++] = (unsigned)integer();
    while (n < 3 && accept(","));
  }

  // ---- module level
  void skipPast(const char* mark) {
    while (!accept(mark)) {
      if (kind_ == End) fail("expected '", mark, "' before the end of the file");
      advance();
    }
  }

  void topLevel() {
    if (accept(";")) return;
    const bool file = accept(".file");
    if (file || acceptOneOf({".version", ".target", ".address_size"})) {
      if (file) module_->files[(int)integer()] = text_;
      do advance();
      while (accept(","));
      return;
    }
    if (is(".section")) return skipPast("}");
    if (acceptOneOf({".pragma", ".alias", ".noreturn"})) return skipPast(";");
    bool isExtern = false;
    while (is(".extern") || is(".visible") || is(".weak") || is(".common")) isExtern |= ident() == ".extern";
    if (is(".entry") || is(".func")) return function();
    variable()->isExtern |= isExtern;
    expect(";");
  }

  // .global .align 1 .b8 name[7] = {...}   (the terminator is left)
  Var* variable() {
    static const char* const kSpaces[] = {".global", ".shared", ".local", ".param", ".const"};
    auto space = std::find(std::begin(kSpaces), std::end(kSpaces), text_);
    if (space == std::end(kSpaces)) fail("unknown directive '", text_, "'");
    advance();
    Var* v = module_->vars.emplace_back(std::make_unique<Var>()).get();
    v->space = (Space)((int)Space::Global + (space - kSpaces));
    Type type = Type::None;
    unsigned vec = 1;
    while (isDirective()) {
      // `.param .u64 .ptr .global .align 16 name`: the attributes of the pointer are not ours
      if (acceptOneOf({".ptr", ".global", ".const", ".shared", ".local", ".generic"})) continue;
      const std::string d = ident().substr(1);
      if (d == "align") {
        const unsigned a = std::max(1u, (unsigned)integer());
        if (type == Type::None) v->align = a;  // else of what a pointer points to
      } else if (d == "v2" || d == "v4" || d == "v8") {
        vec = (unsigned)(d[1] - '0');
      } else if (d == "attribute") {
        skipPast(")");
      } else {
        type = typeFromName(d);
        if (type == Type::None) fail("unknown type '.", d, "'");
      }
    }
    v->name = ident();
    v->bytes = typeBytes(type) * vec;
    if (v->align == 1) v->align = std::max(1u, (unsigned)v->bytes);
    while (accept("[")) {
      v->bytes *= is("]") ? 0 : (uint64_t)integer();
      expect("]");
    }
    const bool open = v->bytes == 0;  // name[]
    v->isExtern = open && v->space == Space::Shared;
    if (accept("=")) {
      if (v->space != Space::Global && v->space != Space::Const)
        fail("only .global and .const variables have initialisers");
      initializer(*v, type);
      if (open) v->bytes = v->init.size();
      v->init.resize(v->bytes);
    }
    return (scope_ < 0 ? module_->varByName : scope().vars)[v->name] = v;
  }
  void initializer(Var& v, Type type) {
    if (accept("{")) return listUntil("}", [&] { initializer(v, type); });
    uint64_t value = 0;
    if (isNumber()) {
      const Operand o = number();
      value = (uint64_t)o.i;
      if (o.width == 64 && typeBytes(type) == 4) value = bits((float)bitsAs<double>(value));
    } else {  // symbol, generic(symbol), symbol+offset
      if (accept("generic")) expect("(");
      v.relocs.emplace_back(v.init.size(), ident());
      accept(")");
      if (accept("+")) value = (uint64_t)integer();
    }
    for (unsigned i = 0; i < typeBytes(type); ++i) v.init.push_back((uint8_t)(value >> (8 * i)));
  }

  // ---- functions
  void function() {
    Func* f = fn_ = module_->funcs.emplace_back(std::make_unique<Func>()).get();
    f->entry = ident() == ".entry";
    f->scopes.emplace_back();
    located_.clear();
    loc_ = scope_ = 0;
    if (accept("(")) paramList(f->returns);
    f->name = ident();
    if (accept("(")) paramList(f->params);
    while (!is("{") && !is(";")) {
      if (is(".maxntid") || is(".reqntid")) {
        f->required = ident() == ".reqntid";
        dimensions(f->maxDim);
      } else if (accept(".reqnctapercluster")) {
        dimensions(f->cluster);
      } else if (accept(".maxnreg")) {
        f->maxnreg = (unsigned)integer();
      } else if (is(".pragma")) {
        skipPast(";");
      } else if (acceptOneOf(
                     {".minnctapersm", ".maxnctapersm", ".maxclusterrank", ".abi_preserve", ".abi_preserve_control"})) {
        integer();
      } else if (!acceptOneOf({".explicitcluster", ".blocksareclusters", ".noreturn", ".unique"})) {
        fail("unknown function directive '", text_, "'");
      }
    }
    if (!accept(";")) {
      expect("{");
      f->hasBody = true;
      body();
    }
    scope_ = -1;
    Func*& known = module_->funcByName[f->name];
    if (!known || f->hasBody) known = f;
  }
  void paramList(std::vector<Var*>& list) {
    listUntil(")", [&] {
      if (is(".reg")) fail("functions with .reg parameters are not supported");
      list.push_back(variable());
    });
  }

  void body() {
    while (scope_ >= 0) {
      if (kind_ == End) fail("end of file inside a function");
      if (accept("{")) {
        fn_->scopes.emplace_back().parent = scope_;
        scope_ = (int)fn_->scopes.size() - 1;
      } else if (accept("}")) {
        scope_ = scope().parent;
      } else if (isDirective()) {
        directive();
      } else if (!accept(";")) {
        instruction();
      }
    }
    PInst end;  // falling off the end returns
    end.name = "ret";
    end.op = {end.name};
    end.ptxLine = fn_->code.empty() ? 0 : fn_->code.back().ptxLine;
    fn_->code.push_back(end);
  }

  int addLoc(const Loc& l, bool anyCaller = false) {
    int& at = located_[{l.file, l.line, l.column}];
    if (!at || (!anyCaller && module_->locs[(size_t)at].caller != l.caller)) {
      module_->locs.push_back(l);
      at = (int)module_->locs.size() - 1;
    }
    return at;
  }
  Loc position() {
    Loc l;
    for (int* to : {&l.file, &l.line, &l.column}) *to = (int)integer();
    return l;
  }
  void directive() {
    if (accept(".loc")) {
      Loc here = position();
      while (accept(",")) {  // function_name label+off, inlined_at f l c
        if (ident() == "function_name") {
          ident();
          if (accept("+")) integer();
        } else {
          here.caller = addLoc(position(), true);
        }
      }
      loc_ = addLoc(here);
    } else if (accept(".reg")) {
      Type t = Type::None;
      while (isDirective()) t = typeFromName(ident().substr(1));
      if (t == Type::None) fail("unknown register type");
      do {
        const std::string name = ident();
        const bool several = accept("<");  // %r<3> declares %r0, %r1 and %r2
        for (int64_t i = 0, n = several ? integer() : 1; i < n; ++i) {
          fn_->regs.push_back({several ? name + std::to_string(i) : name, t});
          scope().regs[fn_->regs.back().name] = (int)fn_->regs.size() - 1;
        }
        if (several) expect(">");
      } while (accept(","));
      expect(";");
    } else if (is(".pragma")) {
      skipPast(";");
    } else {
      variable();
      if (is(",")) fail("several variables in one declaration");
      expect(";");
    }
  }

  Var* findVar(const std::string& name) {
    if (auto* local = fn_->find(scope_, &Func::Scope::vars, name)) return *local;
    auto it = module_->varByName.find(name);
    return it == module_->varByName.end() ? nullptr : it->second;
  }
  Operand operand() {
    static const struct {
      const char *open, *close;
      Operand::Kind kind;
    } kBrackets[] = {{"{", "}", Operand::Vector}, {"[", "]", Operand::Address}, {"(", ")", Operand::List}};
    Operand o;
    if (accept("!")) {
      o = operand();
      o.negate = true;
      return o;
    }
    for (auto& bracket : kBrackets)
      if (accept(bracket.open)) {
        o.kind = bracket.kind;
        listUntil(bracket.close, [&] { o.sub.push_back(operand()); });
        if (o.kind == Operand::Address && o.sub.empty()) fail("an address is expected");
        return o;
      }
    if (isNumber()) return number();
    o.name = ident();
    if (o.name == "_") {
      o.kind = Operand::Sink;
    } else if (auto* reg = fn_->find(scope_, &Func::Scope::regs, o.name)) {
      o.kind = Operand::Register;
      o.reg = *reg;
    } else if (o.special = findSpecial(o.name, &o.dimension); o.special) {
      o.kind = Operand::Special;
    } else if (o.var = findVar(o.name); o.var) {
      o.kind = Operand::Symbol;
    } else {
      o.kind = Operand::Name;
      if (o.name[0] == '%') fail("register '", o.name, "' is not declared");
    }
    if (is("+") || is("-")) {  // reg+imm, sym+imm; "+-16" occurs
      accept("+");
      o.i = integer();
    }
    if (!accept("|")) return o;
    Operand pair;
    pair.kind = Operand::Pair;
    pair.sub = {o, operand()};
    return pair;
  }

  void instruction() {
    PInst in;
    in.ptxLine = line_;
    in.scope = scope_;
    in.loc = loc_;
    if (accept("@")) {
      in.guard.push_back(operand());
      if (in.guard[0].reg < 0) fail("predicate '", in.guard[0].name, "' is not declared");
    }
    const std::string name = in.name = ident();
    if (accept(":")) {  // label, or `label: .branchtargets a, b;`
      if (accept(".branchtargets"))
        listUntil(";", [&] { scope().targets[name].push_back(ident()); });
      else if (is(".callprototype") || is(".calltargets"))
        skipPast(";");
      else
        scope().labels[name] = (int)fn_->code.size();
      return;
    }
    for (std::string_view rest = name; !rest.empty();) in.op.emplace_back(cut(rest, '.'));
    listUntil(";", [&] { in.args.push_back(operand()); });
    fn_->code.push_back(std::move(in));
  }
};

}  // namespace

Type typeFromName(std::string_view s) {
#define ROW(type, name, bytes) std::make_pair(#name, Type::type)
  static const std::unordered_map<std::string_view, Type> kByName = {TYPES(ROW)};
#undef ROW
  auto it = kByName.find(s);
  return it == kByName.end() ? Type::None : it->second;
}

std::string Module::position(int loc) const {
  const Loc& l = locs[(size_t)loc];
  return l.line && files.count(l.file) ? cat(files.at(l.file), ":", l.line) : "";
}

std::unique_ptr<Module> parse(const char* text) { return Parser(text).run(); }

}  // namespace ptxsim
