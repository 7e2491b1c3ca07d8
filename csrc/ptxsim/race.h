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

// The memory that an access belongs to, for reports.
struct Memory {
  const Cta* cta;
  const Buffer* buffer;
  std::string name() const { return cta ? "shared memory of CTA " + std::to_string(cta->linear) : buffer->name; }
};

// ---- between the lanes of a warp
struct LaneUnit {  // who wrote some bytes last, who has read them since; a warp of the grid from 1, 0: nobody
  uint32_t writeWarp = 0, writeTime = 0, writeLanes = 0, writePc = 0;
  uint32_t readWarp = 0, readTime = 0, readLanes = 0, readPc = 0;
};
struct LanePage {               // of kPageBytes
  unsigned shift = 4;           // units of 16 bytes, or as few as the smallest access to the page
  std::vector<LaneUnit> units;  // empty: no access yet
};
constexpr uint32_t kPageBytes = 1024;
uint32_t raceAgent(const Warp& w);  // its number in the grid
void laneStart(Warp& w);
void laneSync(Warp& w, uint32_t m);                        // the lanes of m hear of what the others did
enum class LaneAccess : uint8_t { Read, Write, Rewrite };  // Rewrite: a write of what was there
// One lane's access, which lies in one page.
void laneAccess(Warp& w, const Inst& in, int lane, LanePage& page, const Memory& memory, uint64_t offset,
                uint32_t bytes, LaneAccess kind);
// The same by an asynchronous operation, when it is issued or when the lane has waited for it.
void laneAsync(Warp& w, const Inst& in, int lane, Cta& cta, uint32_t offset, uint32_t bytes, Kind kind);

struct RaceState;
RaceState* raceCreate(Launch& l);
void raceDestroy(RaceState*);
void raceStart(Launch& l, Cluster& c, uint64_t index);
enum { FenceMemory, FenceAsync, FenceTensormap, FenceMbarrierInit, FenceAlias };  // in x[0] of the instruction
void raceFence(Warp& w, const Inst& in, uint32_t m);
void raceArrive(Warp& w, NamedBarrier& b);
void raceBarrier(Cta& cta, NamedBarrier& b);                               // b is complete: its waiters go on
void raceTensorMap(Warp& w, const Inst& in, Buffer& b, uint64_t address);  // a copy uses the 128 bytes there
void raceClusterArrive(Warp& w, bool release);
void raceClusterDone(Cluster& c);
void raceClusterWait(Warp& w);
void raceExit(Warp& w);  // its last thread exits

// ---- mbarriers and asynchronous operations
void raceMbarrierInit(Warp& w, int lane, Mbarrier& b);
void raceMbarrierUse(Warp& w, const Inst& in, int lane, const Mbarrier& b);  // its init must come before
// Another CTA's shared memory: it must have started, and stay until the access is over. `op`: what makes the access.
void raceRemote(Warp& w, const Inst& in, int lane, Cta& target, const AsyncOp* op);
void racePlace(Warp& w, const Inst& in, const Place& p, uint32_t bytes, Kind kind);
void raceRelease(Warp& w, Mbarrier& b, bool release);
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
