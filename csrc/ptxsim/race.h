// Happens-before check of memory accesses.
#pragma once
#include "access.h"

namespace ptxsim {

void raceAccess(Warp& w, const Inst& in, uint32_t m, Space space, const uint64_t* address, uint32_t bytes, Kind kind);

struct RaceState;
RaceState* raceCreate(Launch& l);
void raceDestroy(RaceState*);
void raceStart(Launch& l, Cluster& c, uint64_t index);
void raceFence(Warp& w, const Inst& in, uint32_t m);
void raceArrive(Warp& w, NamedBarrier& b, bool waits);
void raceBarrier(Cta& cta, NamedBarrier& b);     // b is complete: its waiters go on
void raceClusterArrive(Warp& w, bool release);
void raceClusterDone(Cluster& c);
void raceClusterWait(Warp& w);

// ---- mbarriers and asynchronous operations
void raceAccessShared(Warp& w, const Inst& in, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind);
void raceRelease(Warp& w, const Inst& in, Mbarrier& b, bool release, bool remote);
void raceAcquire(Warp& w, Mbarrier& b, bool acquire);
void racePhase(Mbarrier& b);                              // the open phase is complete
void raceIssue(Warp& w, AsyncOp& op);                     // op starts after what w has done
void raceAsyncShared(AsyncOp& op, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind);
void raceAsyncGlobal(AsyncOp& op, Buffer& b, uint64_t address, uint64_t bytes, Kind kind);
void raceAsyncSignal(const AsyncOp& op, Mbarrier& b);     // op completes on b
void raceReadMap(Warp& w, const Inst& in, uint64_t address);
void raceWaited(Warp& w, const AsyncOp& op, bool readsOnly);

}  // namespace ptxsim
