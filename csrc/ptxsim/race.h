// Happens-before check of memory accesses.
#pragma once
#include "access.h"

namespace ptxsim {

// The lanes of m access `bytes` each. A rewrite nobody can see: it is only remembered.
void raceAccess(Warp& w, const Inst& in, uint32_t m, const uint64_t* address, uint32_t bytes, Kind kind);

// Where the tensor copy that filled 16 bytes of shared memory took them from.
struct Provenance {
  uint64_t address = 0;  // in global memory, or where it would lie outside the tensor
  uint32_t op = 0;       // the copy; 0: not from a tensor copy, or unknown
};
Provenance& raceTag(Cta& cta, uint32_t offset);  // where races are looked for

// A byte of a CTA's shared memory or of a buffer.
struct Spot {
  Cta* cta;
  const Buffer* buffer;
  RaceShadow* shadow;
  uint64_t offset;
  std::string name() const { return cta ? cat("shared memory of CTA ", cta->linear) : buffer->name; }
};

// ---- between the lanes of a warp
struct LaneTouch {  // by a warp of the grid from 1, 0: nobody
  uint32_t warp, time, lanes, pc;
};
struct LaneUnit {  // who wrote some bytes last, who has read them since
  LaneTouch write, read;
};
struct LanePage {               // of kPageBytes
  unsigned shift = 4;           // units of 16 bytes, or as few as the smallest access to the page
  std::vector<LaneUnit> units;  // empty: no access yet
};
constexpr uint32_t kPageBytes = 1024;
void laneSync(Warp& w, uint32_t m);  // the lanes of m hear of what the others did
// One lane's access, which lies in one page.
void laneAccess(Warp& w, const Inst& in, int lane, LanePage& page, const Spot& at, uint32_t bytes, Kind kind);
// The same by an asynchronous operation, when it is issued or when the lane has waited for it.
void laneAsync(Warp& w, const Inst& in, int lane, const Place& p, uint32_t bytes, Kind kind);

void raceStart(Launch& l, Cluster& c, uint64_t index);
enum { FenceMemory, FenceAsync, FenceTensormap, FenceMbarrierInit, FenceAlias };  // in x[0] of the instruction
void raceGridWait(Warp& w);                                                       // griddepcontrol.wait
void raceFence(Warp& w, const Inst& in, uint32_t m);
void raceTensorMap(Warp& w, const Inst& in, const Place& p);  // a copy uses the 128 bytes there
void raceClusterArrive(Warp& w, bool release);
void raceClusterWait(Warp& w);

// ---- mbarriers and asynchronous operations
void raceMbarrierInit(Warp& w, int lane, Mbarrier& b);
void raceMbarrierUse(Warp& w, const Inst& in, int lane, const Mbarrier& b);  // its init must come before
// Another CTA's shared memory: it must have started, and stay until the access is over. `op`: what makes the access.
void raceRemote(Warp& w, const Inst& in, int lane, Cta& target, const AsyncOp* op);
void racePlace(Warp& w, const Inst& in, const Place& p, uint32_t bytes, Kind kind);
// What w has done, or its last fence if this is no release, comes before whatever acquires `clock`.
void raceRelease(Warp& w, std::shared_ptr<RaceClock>& clock, bool release = true);
void raceAcquire(Warp& w, const std::shared_ptr<RaceClock>& clock, bool acquire = true);  // null: nothing to learn
void raceWaited(Warp& w, const Mbarrier& b, bool acquire);
void raceIssue(AsyncOp& op);  // which starts after what its clock was told of
void raceAsync(const AsyncOp& op, const Place& p, uint32_t bytes, Kind kind);
void raceAsyncSignal(const AsyncOp& op, Mbarrier& b);  // op completes on b
void raceWaited(Warp& w, const AsyncOp& op, bool readsOnly);

}  // namespace ptxsim
