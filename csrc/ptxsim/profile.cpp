// What launches did: instructions by class, and executions of each basic block, added up over launches.
#include <algorithm>

#include "sim.h"

namespace ptxsim {
namespace {

// One of the words of a text that this character separates.
bool has(const std::string& text, char separator, const std::string& word) {
  return (separator + text + separator).find(separator + word + separator) != std::string::npos;
}
bool hasPart(const std::string& op, const char* part) { return has(op, '.', part); }
std::string mnemonic(const std::string& op) { return op.substr(0, op.find('.')); }

// ---- instruction classes, and what always belongs to one

const struct {
  const char *name, *mnemonics;
} kClasses[] = {{"move", "mov cvta isspacep mapa getctarank"},
                {"integer", ""},
                {"float", ""},
                {"special", "ex2 lg2 rcp rsqrt sqrt sin cos tanh"},
                {"convert", "cvt"},
                {"global", ""},
                {"shared", "ldmatrix stmatrix"},
                {"local", ""},
                {"param", ""},
                {"generic", ""},
                {"async", "cp tensormap"},
                {"wgmma", "wgmma"},
                {"mma", "mma"},
                {"warp", "shfl vote match redux elect activemask movmatrix"},
                {"barrier", "bar barrier"},
                {"mbarrier", "mbarrier"},
                {"fence", "fence membar"},
                {"control", "bra brx call ret exit trap brkpt"},
                {"other", "nanosleep griddepcontrol setmaxnreg pmevent createpolicy"}};
constexpr size_t kNumClasses = std::size(kClasses);

const char* className(const std::string& op) {
  const std::string name = mnemonic(op);
  if (has("st red", ' ', name) && hasPart(op, "async")) return "async";
  if (has("ld ldu st atom red prefetch prefetchu applypriority", ' ', name)) {
    for (const char* space : {"global", "shared", "local", "param"})
      if (hasPart(op, space) || op.find(std::string(".") + space + "::") != std::string::npos) return space;
    return hasPart(op, "const") ? "param" : "generic";
  }
  for (auto& c : kClasses)
    if (has(c.mnemonics, ' ', name)) return c.name;
  const std::string type = op.substr(op.rfind('.') + 1);
  return (type[0] == 'f' || type[0] == 'b') && typeFromName(type) >= Type::F16 ? "float" : "integer";
}
uint8_t classNumber(const std::string& op) {
  const std::string name = className(op);
  return (uint8_t)(std::find_if(kClasses, std::end(kClasses), [&](auto& c) { return name == c.name; }) - kClasses);
}

// ---- basic blocks

struct Block {
  uint32_t first, last;  // instructions
  std::vector<uint32_t> to;
  const char* kind = "code";
};

bool guarded(const Inst& in) { return in.guard != kNoGuard; }

std::vector<Block> blocksOf(const Kernel& k) {
  const uint32_t n = (uint32_t)k.code.size();
  std::vector<Block> blocks;
  std::vector<uint32_t> blockAt(n);
  for (uint32_t i = 0; i < n; ++i) {
    if (k.leader[i] || !i) blocks.push_back({i, i, {}});
    blocks.back().last = i;
    blockAt[i] = (uint32_t)blocks.size() - 1;
  }
  for (auto& b : blocks) {
    const Inst& in = k.code[b.last];
    const std::string name = mnemonic(k.source[b.last].text);
    if (name == "bra") b.to.push_back(blockAt[(size_t)in.imm]);
    if (name == "brx")
      for (int t : in.ext->targets) b.to.push_back(blockAt[(size_t)t]);
    if ((guarded(in) || !has("bra brx ret exit trap", ' ', name)) && b.last + 1 < n)
      b.to.push_back(blockAt[b.last + 1]);
  }
  return blocks;
}

// A block that can only end in a trap or a failed assertion.
void markTraps(const Kernel& k, std::vector<Block>& blocks) {
  auto traps = [&](const Block& b) {
    for (uint32_t i = b.first; i <= b.last; ++i) {
      if (guarded(k.code[i])) continue;
      const std::string& op = k.source[i].text;
      if (op == "trap" || (op.compare(0, 4, "call") == 0 && k.code[i].ext->text == "__assertfail")) return true;
    }
    return !b.to.empty() && std::all_of(b.to.begin(), b.to.end(), [&](uint32_t t) { return blocks[t].kind[0] == 't'; });
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = blocks.size(); i--;)
      if (blocks[i].kind[0] != 't' && traps(blocks[i])) blocks[i].kind = "trap", changed = true;
  }
}

// A loop that looks at memory or an mbarrier and changes nothing: its blocks run only when the first look fails.
bool spins(const Kernel& k, const std::vector<Block>& blocks, const std::vector<uint32_t>& loop) {
  bool polls = false;
  for (uint32_t b : loop)
    for (uint32_t i = blocks[b].first; i <= blocks[b].last; ++i) {
      const std::string& op = k.source[i].text;
      const std::string name = mnemonic(op);
      const bool look = hasPart(op, "try_wait") || hasPart(op, "test_wait") || (name == "atom" && hasPart(op, "cas")) ||
                        (name == "ld" && (hasPart(op, "acquire") || hasPart(op, "relaxed") || hasPart(op, "volatile")));
      polls |= look;
      if (!look && has("st red atom cp wgmma mma bar barrier mbarrier call stmatrix ldmatrix brx", ' ', name))
        return false;
    }
  return polls;
}

void markSpins(const Kernel& k, std::vector<Block>& blocks) {
  const uint32_t n = (uint32_t)blocks.size();
  std::vector<std::vector<uint32_t>> from(n);
  for (uint32_t i = 0; i < n; ++i)
    for (uint32_t t : blocks[i].to) from[t].push_back(i);
  // Back edges of a depth-first walk, and what each encloses.
  enum : uint8_t { New, Open, Done };
  std::vector<uint8_t> state(n, New);
  std::vector<std::pair<uint32_t, uint32_t>> back;
  auto walk = [&](uint32_t b, auto& self) -> void {
    state[b] = Open;
    for (uint32_t t : blocks[b].to) {
      if (state[t] == Open) back.push_back({b, t});
      if (state[t] == New) self(t, self);
    }
    state[b] = Done;
  };
  for (uint32_t root = 0; root < n; ++root)
    if (state[root] == New) walk(root, walk);
  for (auto& edge : back) {
    std::vector<uint32_t> loop = {edge.second};
    if (edge.first != edge.second) loop.push_back(edge.first);
    for (size_t i = 1; i < loop.size(); ++i)
      for (uint32_t f : from[loop[i]])
        if (std::find(loop.begin(), loop.end(), f) == loop.end()) loop.push_back(f);
    if (!spins(k, blocks, loop)) continue;
    for (uint32_t b : loop)
      if (blocks[b].kind[0] != 't') blocks[b].kind = "spin";
  }
}

}  // namespace

// Coverage of one kernel of one module text. It outlives the module.
struct Coverage {
  size_t module;
  struct Row {  // of a block or a predicated instruction
    std::string text;
    uint32_t at;  // its instruction
    uint64_t count = 0;
  };
  std::vector<Row> rows;
};

namespace {

std::map<std::string, std::vector<std::shared_ptr<Coverage>>> gCoverage;

// Where a block is: at its first instruction that has a position, or where what lies before it is.
std::string positions(const Kernel& k, const Block& b) {
  const std::vector<Loc>& locs = k.module->locs;
  auto named = [&](uint32_t pc) { return locs[(size_t)k.source[pc].loc].line != 0; };
  uint32_t pc = b.first;
  while (pc < b.last && !named(pc)) ++pc;
  while (pc && !named(pc)) --pc;
  std::string s;
  for (int loc = k.source[pc].loc; loc; loc = locs[(size_t)loc].caller)
    s += cat("\t", k.module->position(loc), ":", locs[(size_t)loc].column);
  return s;
}

std::shared_ptr<Coverage> makeCoverage(const Kernel& k) {
  auto& known = gCoverage[k.name];
  for (auto& c : known)
    if (c->module == k.module->hash) return c;
  auto c = std::make_shared<Coverage>(Coverage{k.module->hash, {}});
  std::vector<Block> blocks = blocksOf(k);
  markTraps(k, blocks);
  markSpins(k, blocks);
  auto add = [&](const Block& b, const char* kind) {
    c->rows.push_back({cat(kind, "\t", k.source[b.first].ptxLine, positions(k, b)), b.first});
  };
  for (auto& b : blocks) {
    if (b.first == b.last && !k.source[b.first].loc && k.source[b.first].text == "ret") continue;  // added by decoding
    add(b, b.kind);
    for (uint32_t i = b.first; i <= b.last; ++i)
      if (guarded(k.code[i]) && k.source[i].text.compare(0, 2, "br") != 0)
        add({i, i, {}}, k.source[i].text == "trap" ? "trap" : "predicated");
  }
  known.push_back(c);
  return c;
}

}  // namespace

void profileStart(Kernel& k) {
  if (!k.coverage) {
    k.coverage = makeCoverage(k);
    for (auto& s : k.source) k.classOf.push_back(classNumber(s.text));
  }
  k.hits.assign(k.code.size(), 0);
  k.taken.assign(k.code.size(), 0);
}

void profileEnd(Kernel& k) {
  for (auto& row : k.coverage->rows) {
    const char kind = row.text[0];
    row.count += kind == 'p' || (kind == 't' && guarded(k.code[row.at])) ? k.taken[row.at] : k.hits[row.at];
  }
}

// Warp instructions of the last launch: "class": count, ...
std::string instructionCounts(const Kernel& k) {
  uint64_t sum[kNumClasses] = {};
  for (size_t i = 0; i < k.code.size(); ++i) sum[k.classOf[i]] += k.hits[i];
  std::string s;
  for (size_t i = 0; i < kNumClasses; ++i) s += cat(i ? ", \"" : "\"", kClasses[i].name, "\": ", sum[i]);
  return s;
}

// One line for each block or predicated instruction of each version of a kernel, fields separated by tabs: version,
// executions, kind, PTX line, positions ("file:line:column") from the innermost function outwards.
std::string coverageOf(const std::string& kernel) {
  std::string s;
  const auto& versions = gCoverage[kernel];
  for (size_t v = 0; v < versions.size(); ++v)
    for (auto& row : versions[v]->rows) s += cat(v, "\t", row.count, "\t", row.text, "\n");
  return s;
}

}  // namespace ptxsim
