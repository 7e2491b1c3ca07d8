// What launches did, instruction by instruction. tests/basic_blocks.py makes blocks and classes of it.
#include "sim.h"

namespace ptxsim {

static std::map<std::string, std::list<Coverage>> gCoverage;  // by kernel, its versions
static Coverage* gLast;

static std::string describe(const Kernel& k, size_t pc) {
  const Inst& in = k.code[pc];
  const PInst& source = *k.source[pc];
  const std::vector<Loc>& locs = k.module->locs;
  std::ostringstream s;
  s << source.name << '\t' << (k.leader[pc] ? "L" : "") << (in.guard ? "G" : "") << '\t';
  if (source.op[0] == "bra") s << in.imm;
  if (in.ext) {
    for (int target : in.ext->targets) s << target << ' ';
    s << in.ext->text;
  }
  s << '\t' << source.ptxLine;
  const bool same = pc && source.loc == k.source[pc - 1]->loc, none = !locs[(size_t)source.loc].line;
  if (same) s << "\t=";
  for (int loc = same || none ? 0 : source.loc; loc; loc = locs[(size_t)loc].caller)
    s << '\t' << k.module->position(loc) << ':' << locs[(size_t)loc].column;
  return s.str();
}

void profileStart(Kernel& k) {
  auto& versions = gCoverage[k.name];
  auto known = std::find_if(versions.begin(), versions.end(), [&](auto& c) { return c.module == k.module->hash; });
  if (known == versions.end()) {
    known = versions.emplace(known);
    known->module = k.module->hash;
    for (size_t pc = 0; pc < k.code.size(); ++pc) known->rows.push_back(describe(k, pc));
    known->hits.resize(k.code.size());
    known->taken.resize(k.code.size());
  }
  gLast = k.coverage = &*known;
  gLast->before = gLast->hits;
}

// Warp instructions of the last launch: "opcode": count, ...
std::string instructionCounts() {
  std::map<std::string, uint64_t> sum;
  for (size_t i = 0; gLast && i < gLast->rows.size(); ++i)
    sum[gLast->rows[i].substr(0, gLast->rows[i].find('\t'))] += gLast->hits[i] - gLast->before[i];
  std::string s;
  for (auto& [opcode, n] : sum) s += cat(s.empty() ? "\"" : ", \"", opcode, "\": ", n);
  return s;
}

// One line for each instruction of each version of a kernel, fields separated by tabs: version; executions; those of
// them with a lane to run for; opcode; L if it starts a basic block, G if it is predicated; the instructions it
// branches to or the function it calls; PTX line; positions ("file:line:column") from the innermost function outwards,
// or "=" for those of the instruction before.
std::string coverageOf(const std::string& kernel) {
  std::ostringstream s;
  unsigned version = 0;
  for (const Coverage& c : gCoverage[kernel]) {
    for (size_t i = 0; i < c.rows.size(); ++i)
      s << version << '\t' << c.hits[i] << '\t' << c.taken[i] << '\t' << c.rows[i] << '\n';
    ++version;
  }
  return s.str();
}

}  // namespace ptxsim
