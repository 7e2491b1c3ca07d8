// Races between the lanes of one warp on its CTA's shared memory. Lanes that run one instruction together are not
// ordered by it: what one lane wrote another may touch only after bar.warp.sync, or a barrier or acquire that brings
// news. Each lane remembers when it last had such news, each 4-byte word who touched it last and when.
#include "race.h"

namespace ptxsim {
namespace {

struct Word {
  uint32_t writeTime = 0, readTime = 0, readLanes = 0, writePc = 0, readPc = 0;
  uint16_t writeWarp = 0, readWarp = 0;  // number in the CTA, from 1; 0: nobody, or accesses that are not looked at
  uint8_t writeLane = 0;
};
constexpr uint32_t kPageWords = 256;

}  // namespace

struct LaneShadow {
  std::vector<std::unique_ptr<Word[]>> pages;
  Word& at(uint32_t word) {
    auto& p = pages[word / kPageWords];
    if (!p) p.reset(new Word[kPageWords]());
    return p[word % kPageWords];
  }
};

void laneStart(Cta& cta) {
  cta.lanes = std::make_shared<LaneShadow>();
  cta.lanes->pages.resize(cta.smemBytes / (4 * kPageWords) + 1);
  for (auto& w : cta.warps) {
    w.laneTime = 1;
    std::fill_n(w.laneNews, kLanes, 0);
  }
}

void laneSync(Warp& w, uint32_t m) {
  if (!w.launch->race) return;
  ++w.laneTime;
  for (uint32_t left = m; left; left &= left - 1) w.laneNews[__builtin_ctz(left)] = w.laneTime;
}

void laneAccess(Warp& w, const Inst& in, uint32_t m, const uint64_t* a, uint32_t bytes, bool write) {
  LaneShadow& shadow = *w.cta->lanes;
  const uint16_t self = (uint16_t)(w.index + 1);
  const uint32_t pc = (uint32_t)(&in - w.kernel->code.data());
  auto race = [&](int lane, const char* verb, uint32_t other, uint32_t otherPc, uint32_t word) {
    w.fail(in, lane,
           "race on shared memory of CTA " + std::to_string(w.cta->linear) + " at byte " + std::to_string(word * 4) +
               " between lanes of a warp: this " + (write ? "write" : "read") + " and the " + verb + " by lane " +
               std::to_string(other) + " at " + w.kernel->place(otherPc) +
               ": nothing orders them (bar.warp.sync is missing)");
  };
  for (uint32_t left = m; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const uint32_t news = w.laneNews[i], first = ((uint32_t)a[i] & 0xffffffu) / 4;
    for (uint32_t k = first; k <= (((uint32_t)a[i] & 0xffffffu) + bytes - 1) / 4; ++k) {
      Word& word = shadow.at(k);
      if (bytes < 4) {  // several lanes may own parts of the word
        word.writeWarp = word.readWarp = 0;
        continue;
      }
      if (word.writeWarp == self && word.writeLane != i && word.writeTime >= news)
        race(i, "write", word.writeLane, word.writePc, k);
      if (write) {
        if (word.readWarp == self && word.readTime >= news && word.readLanes & ~(1u << i))
          race(i, "read", (uint32_t)__builtin_ctz(word.readLanes & ~(1u << i)), word.readPc, k);
        word.writeTime = w.laneTime, word.writePc = pc;
        word.writeWarp = self, word.writeLane = (uint8_t)i;
        word.readWarp = 0;
      } else if (word.readWarp == self && word.readTime == w.laneTime) {
        word.readLanes |= 1u << i;
      } else {
        word.readWarp = self, word.readTime = w.laneTime, word.readLanes = 1u << i, word.readPc = pc;
      }
    }
  }
}

}  // namespace ptxsim
