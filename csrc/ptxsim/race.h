// Happens-before check of memory accesses.
#pragma once
#include "access.h"

namespace ptxsim {

// Stores: the lanes of `changed` altered memory, the others wrote what was there.
void raceWrites(Warp& w, const Inst& in, uint32_t m, uint32_t changed, Space space, const uint64_t* a, uint32_t bytes);
void raceAccess(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* address, uint32_t bytes, Kind kind);

// Where the tensor copy that filled 16 bytes of shared memory took them from.
struct Provenance {
  uint64_t address = 0;  // in global memory, or where it would lie outside the tensor
  uint32_t op = 0;       // the copy; 0: not from a tensor copy
};
void raceTag(Cta& cta, uint32_t offset, const Provenance& from);
const Provenance* raceTagOf(Cta& cta, uint32_t offset);  // nullptr: unknown

// Between the lanes of a warp: those of m hear of what the others did; they access their CTA's shared memory.
void laneStart(Cta& cta);
void laneSync(Warp& w, uint32_t m);
void laneAccess(Warp& w, const Inst& in, uint32_t m, const uint64_t* address, uint32_t bytes, bool write);

struct RaceState;
RaceState* raceCreate(Launch& l);
void raceDestroy(RaceState*);
void raceStart(Launch& l, Cluster& c, uint64_t index);
void raceFence(Warp& w, const Inst& in, uint32_t m);
void raceArrive(Warp& w, NamedBarrier& b, bool waits);
void raceBarrier(Cta& cta, NamedBarrier& b);                               // b is complete: its waiters go on
void raceTensorMap(Warp& w, const Inst& in, Buffer& b, uint64_t address);  // a copy uses the 128 bytes there
void raceClusterArrive(Warp& w, bool release);
void raceClusterDone(Cluster& c);
void raceClusterWait(Warp& w);
void raceExit(Warp& w);  // its last thread exits

// ---- mbarriers and asynchronous operations
void raceMbarrierInit(Warp& w, Mbarrier& b);
void raceMbarrierUse(Warp& w, const Inst& in, int lane, const Mbarrier& b);  // its init must come before
// Another CTA's shared memory: it must have started, and stay until the access is over. `op`: what makes the access.
void raceRemote(Warp& w, const Inst& in, int lane, Cta& target, const AsyncOp* op);
void racePlace(Warp& w, const Inst& in, const Place& p, uint32_t bytes, Kind kind);
void raceRelease(Warp& w, const Inst& in, Mbarrier& b, bool release, bool remote);
void raceAcquire(Warp& w, Mbarrier& b, bool acquire);
void racePhase(Mbarrier& b);                                // the open phase is complete
void raceIssue(Warp& w, AsyncOp& op);                       // op starts after what w has done
void raceJoin(Warp& w, std::shared_ptr<RaceClock>& clock);  // the same in two steps, for one that several warps issue
void raceIssueAt(AsyncOp& op, const std::shared_ptr<RaceClock>& clock);
void raceAsyncShared(AsyncOp& op, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind);
void raceAsyncGlobal(AsyncOp& op, Buffer& b, uint64_t address, uint64_t bytes, Kind kind);
void raceAsyncSignal(const AsyncOp& op, Mbarrier& b);  // op completes on b
void raceWaited(Warp& w, const AsyncOp& op, bool readsOnly);

}  // namespace ptxsim
