// Shared by the asynchronous instructions: mbarriers and the bookkeeping of operations in flight.
#pragma once
#include "access.h"
#include "ops.h"
#include "race.h"

namespace ptxsim {

// The live mbarrier at a shared::cluster address; fails if there is none.
Mbarrier& mbarrierAt(Warp& w, const Inst& in, int lane, uint32_t address, Cta** owner = nullptr);
void completeTx(Warp& w, const Inst& in, int lane, uint32_t address, uint32_t bytes, const AsyncOp* op);
uint32_t sharedOf(Warp& w, const Inst& in, int lane, Space space,
                  uint64_t address);  // shared or generic -> shared::cluster address

// Puts an operation in flight. `track`: where its group is kept, or nullptr.
void track(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t);
void launchOp(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* track);
void commitGroups(OpTrack& t, uint32_t m);
// Waits until at most `n` groups of the lanes of m are open (all: uncommitted ones too); false: blocked.
bool waitGroups(Warp& w, OpTrack& t, uint32_t m, uint32_t n, bool reads, bool all);
uint64_t atomicResult(int op, Type t, uint64_t old, uint64_t b, uint64_t c);
int takeAtomOp(Dec& d);

struct AddressOperand {  // an address among several of one instruction
  Ref ref;
  int64_t offset = 0;
  unsigned bytes = 8;
  uint64_t get(Warp& w, unsigned lane) const { return laneBits(w, ref, bytes, (int)lane) + (uint64_t)offset; }
};
AddressOperand addressOperand(Dec& d, const Operand& o);

}  // namespace ptxsim
