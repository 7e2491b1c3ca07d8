// What launches did, instruction by instruction. tests/basic_blocks.py makes blocks and classes of it.
#include "sim.h"

namespace ptxsim {

static std::map<std::string, std::vector<std::shared_ptr<Coverage>>> gCoverage;  // by kernel, its versions
static std::shared_ptr<Coverage> gLast;

static std::string describe(const Kernel& k, size_t pc) {
  const Inst& in = k.code[pc];
  const PInst& source = *k.source[pc];
  const std::vector<Loc>& locs = k.module->locs;
  std::string s = cat(source.name, "\t", k.leader[pc] ? "L" : "", in.guard ? "G" : "", "\t");
  if (source.op[0] == "bra") s += cat(in.imm);
  if (in.ext) {
    for (int target : in.ext->targets) s += cat(target, " ");
    s += in.ext->text;
  }
  s += cat("\t", source.ptxLine);
  if (pc && source.loc == k.source[pc - 1]->loc) return s + "\t=";
  for (int loc = source.loc; locs[(size_t)source.loc].line && loc; loc = locs[(size_t)loc].caller)
    s += cat("\t", k.module->position(loc), ":", locs[(size_t)loc].column);
  return s;
}

void profileStart(Kernel& k) {
  if (!k.coverage) {
    auto& versions = gCoverage[k.name];
    auto known = std::find_if(versions.begin(), versions.end(), [&](auto& c) { return c->module == k.module->hash; });
    if (known == versions.end()) {
      auto c = std::make_shared<Coverage>();
      c->module = k.module->hash;
      for (size_t pc = 0; pc < k.code.size(); ++pc) c->rows.push_back(describe(k, pc));
      c->hits.resize(k.code.size());
      c->taken.resize(k.code.size());
      known = versions.insert(versions.end(), std::move(c));
    }
    k.coverage = *known;
  }
  gLast = k.coverage;
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
  std::string s;
  const auto& versions = gCoverage[kernel];
  for (size_t v = 0; v < versions.size(); ++v)
    for (size_t i = 0; i < versions[v]->rows.size(); ++i)
      s += cat(v, "\t", versions[v]->hits[i], "\t", versions[v]->taken[i], "\t", versions[v]->rows[i], "\n");
  return s;
}

}  // namespace ptxsim
