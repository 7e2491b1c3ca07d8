// Shared by the memory and asynchronous instructions: mbarriers and the bookkeeping of operations in flight.
#pragma once
#include "race.h"

namespace ptxsim {

inline uint32_t inCta(uint32_t address, uint32_t rank) { return (address & 0xffffff) | rank << 24; }
// The live mbarrier at a shared::cluster address; fails if there is none.
Mbarrier& mbarrierAt(Warp& w, const Inst& in, int lane, uint32_t address);
// An operation completes there: so many bytes have come, and so many arrivals.
void completeOn(const AsyncOp& op, int lane, uint32_t address, uint32_t bytes, uint32_t arrivals = 0);

// Puts an operation in flight. `track`: where its group is kept, or nullptr.
void track(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t);
void launchOp(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* track);
template <OpTrack Warp::* kTrack>
void commitGroup(Warp& w, const Inst&, uint32_t m) {
  for (int i : lanesOf(m)) ++(w.*kTrack).committed[i];
}
// Waits until at most `n` groups of the lanes of m are open (all: uncommitted ones too); false: blocked.
bool waitGroups(Warp& w, OpTrack& t, uint32_t m, uint32_t n, bool reads, bool all);
template <OpTrack Warp::* kTrack, bool all = false>
void waitGroup(Warp& w, const Inst& in, uint32_t m) {  // x[0] .read
  waitGroups(w, w.*kTrack, m, (uint32_t)in.imm, in.x[0], all);
}

// ---- atomic operations
#define ATOMIC_OPERATION "add|min|max|and|or|xor|inc|dec|cas|exch"  // numbered so, elsewhere too
// What the operation makes of values that fill the low bytes, as does the result; what is above does not matter.
uint64_t atomicResult(int op, Type t, uint64_t old, uint64_t b);
// n bytes at `to` become what the operation, or a copy if it is negative, makes of them and those at `from`. `other`:
// what cas, here of one element, puts there.
void combine(int op, Type t, uint8_t* to, const uint8_t* from, uint32_t n, const uint8_t* other = nullptr);

// ---- decoding
// Modifiers of accesses to memory: x[0] order, x[1] scope, x[2] there is a cache hint, which takeHints() looks at.
#define MEMORY_ORDER                                                                                   \
  "relaxed|acquire|release|acq_rel|volatile? (mmio) cta|cluster|gpu|sys? L2::cache_hint? L1::* L2::* " \
  "(ca|cg|cs|lu|cv|wb|wt) space"
size_t takeHints(Dec& d);  // the number of trailing hint operands

}  // namespace ptxsim
