// Races between the lanes of one warp. Lanes that run one instruction together are not ordered by it: what one lane
// wrote another may touch only after bar.warp.sync, or a barrier or acquire that brings news. Each lane remembers when
// it last had such news, each unit of memory which lanes touched it last and when.
#include "race.h"

namespace ptxsim {

void laneSync(Warp& w, uint32_t m) {
  if (!w.launch->race) return;
  ++w.laneTime;
  for (int i : lanesOf(m)) w.laneNews[i] = w.laneTime;
}

// Makes the units as small as an access of `bytes` needs them: each takes over what was known of the larger one.
static void refine(LanePage& page, uint32_t bytes) {
  const unsigned shift = std::min(page.shift, (unsigned)__builtin_ctz(bytes)), by = page.shift - shift;
  page.units.resize(kPageBytes >> shift);
  for (size_t i = page.units.size(); by && i--;) page.units[i] = page.units[i >> by];
  page.shift = shift;
}

void laneAccess(Warp& w, const Inst& in, int lane, LanePage& page, const Spot& at, uint32_t bytes, Kind kind) {
  const uint32_t self = w.agent + 1, news = w.laneNews[lane], bit = 1u << lane;
  const LaneTouch now{self, w.laneTime, bit, pcOf(w, in)};
  if (page.units.empty() || bytes & ((1u << page.shift) - 1)) refine(page, bytes);
  auto race = [&](const char* verb, uint32_t others, uint32_t otherPc, uint32_t unit) {
    w.fail(in, lane, "race on ", at.name(), " at byte ",
           at.offset / kPageBytes * kPageBytes + ((uint64_t)unit << page.shift), " between lanes of a warp: this ",
           (kind == Kind::Read ? "read" : "write"), " and the ", verb, " by lane ", __builtin_ctz(others), " at ",
           w.kernel->place(otherPc), ": nothing orders them (bar.warp.sync is missing)");
  };
  auto unheard = [&](const LaneTouch& t) { return t.warp == self && t.time >= news ? t.lanes : 0; };
  const uint32_t first = (uint32_t)(at.offset % kPageBytes) >> page.shift;
  for (uint32_t k = first; k < first + (bytes >> page.shift); ++k) {
    LaneUnit& u = page.units[k];
    const uint32_t writers = unheard(u.write);
    if (kind == Kind::Rewrite) {  // whoever wrote the same sees the same
      if (writers) u.write.lanes |= bit;
      continue;
    }
    const bool mayRead = kind == Kind::Read && writers & bit;
    if (writers & ~bit && !mayRead) race("write", writers & ~bit, u.write.pc, k);
    if (kind == Kind::Write) {
      if (const uint32_t readers = unheard(u.read) & ~bit) race("read", readers, u.read.pc, k);
      u = {now, {}};
    } else if (u.read.warp == self && u.read.time == w.laneTime) {
      u.read.lanes |= bit;
    } else {
      u.read = now;
    }
  }
}

}  // namespace ptxsim
