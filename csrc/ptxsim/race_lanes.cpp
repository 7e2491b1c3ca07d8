// Races between the lanes of one warp. Lanes that run one instruction together are not ordered by it: what one lane
// wrote another may touch only after bar.warp.sync, or a barrier or acquire that brings news. Each lane remembers when
// it last had such news, each unit of memory which lanes touched it last and when.
#include "race.h"

namespace ptxsim {

void laneStart(Warp& w) {
  w.laneTime = 1;
  std::fill_n(w.laneNews, kLanes, 0);
}

void laneSync(Warp& w, uint32_t m) {
  if (!w.launch->race) return;
  ++w.laneTime;
  for (int i : lanesOf(m)) w.laneNews[i] = w.laneTime;
}

// Makes the units as small as an access of `bytes` needs them: each takes over what was known of the larger one.
static void refine(LanePage& page, uint32_t bytes) {
  const unsigned shift = std::min(page.shift, (unsigned)__builtin_ctz(bytes));
  std::vector<LaneUnit> units(kPageBytes >> shift);
  if (!page.units.empty())
    for (size_t i = 0; i < units.size(); ++i) units[i] = page.units[i >> (page.shift - shift)];
  page.units = std::move(units);
  page.shift = shift;
}

void laneAccess(Warp& w, const Inst& in, int lane, LanePage& page, const Memory& memory, uint64_t offset,
                uint32_t bytes, LaneAccess kind) {
  const uint32_t self = raceAgent(w) + 1, news = w.laneNews[lane], bit = 1u << lane;
  const uint32_t pc = (uint32_t)(&in - w.kernel->code.data());
  if (page.units.empty() || bytes & ((1u << page.shift) - 1)) refine(page, bytes);
  auto race = [&](const char* verb, uint32_t others, uint32_t otherPc, uint32_t unit) {
    w.fail(in, lane, "race on ", memory.name(), " at byte ",
           offset / kPageBytes * kPageBytes + ((uint64_t)unit << page.shift), " between lanes of a warp: this ",
           (kind == LaneAccess::Read ? "read" : "write"), " and the ", verb, " by lane ", __builtin_ctz(others), " at ",
           w.kernel->place(otherPc), ": nothing orders them (bar.warp.sync is missing)");
  };
  const uint32_t first = (uint32_t)(offset % kPageBytes) >> page.shift;
  for (uint32_t k = first; k < first + (bytes >> page.shift); ++k) {
    LaneUnit& u = page.units[k];
    const bool unordered = u.writeWarp == self && u.writeTime >= news;
    if (kind == LaneAccess::Rewrite) {  // whoever wrote the same sees the same
      if (unordered) u.writeLanes |= bit;
      continue;
    }
    const uint32_t writers =
        unordered ? kind == LaneAccess::Write || !(u.writeLanes & bit) ? u.writeLanes & ~bit : 0 : 0;
    if (writers) race("write", writers, u.writePc, k);
    if (kind == LaneAccess::Write) {
      if (u.readWarp == self && u.readTime >= news && u.readLanes & ~bit) race("read", u.readLanes & ~bit, u.readPc, k);
      u = {self, w.laneTime, bit, pc, 0, 0, 0, 0};
    } else if (u.readWarp == self && u.readTime == w.laneTime) {
      u.readLanes |= bit;
    } else {
      u.readWarp = self, u.readTime = w.laneTime, u.readLanes = bit, u.readPc = pc;
    }
  }
}

}  // namespace ptxsim
