// Special registers (PTX ISA 10): a table of names and of what a lane finds in them, when its warp starts or, in those
// that change while it runs, when `mov` reads them.
#include "sim.h"

namespace ptxsim {
namespace {

uint64_t now(const Warp& w) { return w.launch->clock + w.executed; }
constexpr uint64_t kStart = 1000000000;  // of %globaltimer

// A name that ends in a dot is followed by x, y or z, which is d.
#define VALUE(expression) \
  [](const Warp& w, unsigned lane, unsigned d) -> uint64_t { return (void)w, (void)lane, (void)d, expression; }
const Special kSpecials[] = {
    {"%tid.", VALUE(coordinate(w.launch->block, w.index* kLanes + lane, d))},
    {"%ntid.", VALUE(w.launch->block[d])},
    {"%ctaid.", VALUE(w.cta->id[d])},
    {"%nctaid.", VALUE(w.launch->grid[d])},
    {"%clusterid.", VALUE(w.cta->cluster->id[d])},
    {"%nclusterid.", VALUE(w.launch->grid[d] / w.launch->clusterDim[d])},
    {"%cluster_ctaid.", VALUE(w.cta->id[d] % w.launch->clusterDim[d])},
    {"%cluster_nctaid.", VALUE(w.launch->clusterDim[d])},
    {"%cluster_ctarank", VALUE(w.cta->rank)},
    {"%cluster_nctarank", VALUE(w.launch->ctasPerCluster)},
    {"%is_explicit_cluster", VALUE(w.launch->explicitCluster)},
    {"%laneid", VALUE(lane)},
    {"%warpid", VALUE(w.index)},
    {"%nwarpid", VALUE(w.launch->warpsPerCta)},
    {"%smid", VALUE(w.cta->linear % w.launch->opt.sms)},
    {"%nsmid", VALUE(w.launch->opt.sms)},
    {"%gridid", VALUE(1)},
    {"%lanemask_eq", VALUE(1u << lane)},
    {"%lanemask_le", VALUE((2u << lane) - 1)},
    {"%lanemask_lt", VALUE((1u << lane) - 1)},
    {"%lanemask_ge", VALUE(~((1u << lane) - 1))},
    {"%lanemask_gt", VALUE(~((2u << lane) - 1))},
    {"%dynamic_smem_size", VALUE(w.launch->dynShared)},
    {"%total_smem_size", VALUE(w.kernel->staticShared + w.launch->dynShared)},
    {"%reserved_smem_offset_begin", VALUE(0)},
    {"%reserved_smem_offset_end", VALUE(kSharedReserved)},
    {"%clock", VALUE(now(w)), true},
    {"%clock_hi", VALUE(now(w) >> 32), true},
    {"%clock64", VALUE(now(w)), true},
    {"%globaltimer", VALUE(kStart + now(w)), true},
    {"%globaltimer_lo", VALUE(kStart + now(w)), true},
    {"%globaltimer_hi", VALUE((kStart + now(w)) >> 32), true},
};
#undef VALUE

}  // namespace

const Special kSharedAddress = {"", [](const Warp& w, unsigned, unsigned) -> uint64_t { return w.cta->rank << 24; }};

const Special* findSpecial(const std::string& name, unsigned* dimension) {
  const size_t stem = name.size() > 2 && name[name.size() - 2] == '.' ? name.size() - 1 : name.size();
  *dimension = stem < name.size() ? (unsigned)(name.back() - 'x') : 0;
  for (auto& s : kSpecials)
    if (*dimension < 3 && name.compare(0, stem, s.name) == 0) return &s;
  return nullptr;
}

}  // namespace ptxsim
