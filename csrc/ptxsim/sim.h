// Run-time state of the simulator: decoded instructions, warps, CTAs, clusters and the launch that owns them.
#pragma once
#include <cstring>
#include <deque>
#include <list>
#include <random>

#include "memory.h"
#include "ptx.h"

namespace ptxsim {

constexpr unsigned kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;

using Handler = void (*)(struct Warp&, const struct Inst&, uint32_t mask);

// An operand: 32 lane values at `off` in the warp's registers, or in the kernel's constants when kConstBit is set.
// kNegated: a source predicate with a `!`. `id` names the validity mask that goes with it; id 0 is "always valid".
struct Ref {
  static constexpr uint32_t kConstBit = 0x80000000u, kNegated = 0x40000000u;
  uint32_t off = 0, id = 0;
  explicit operator bool() const { return off || id; }  // false: the operand is not there
};

struct AddressOperand {  // an address beside Inst::a
  Ref ref;
  int64_t offset = 0;
  unsigned bytes = 8;  // of the register
};

struct Extra {  // what does not fit an Inst
  AddressOperand second;
  std::vector<Ref> refs, refs2;
  std::vector<uint32_t> widths;  // register bytes of refs
  std::vector<int> targets;      // brx
  std::string text;
  struct Copy {
    uint32_t from, to, bytes;
  };
  std::vector<Copy> args, rets;  // call: local-frame copies
  int64_t v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
};

struct Inst {
  Handler fn = nullptr;
  Ref d, a, b, c;
  int64_t imm = 0;
  const Extra* ext = nullptr;
  Ref guard;
  bool isWgmma = false;      // may touch registers of wgmma operations in flight
  bool needsFence = false;   // writes a register of a wgmma, which must wait for wgmma.fence
  bool storesD = false;      // d and ext->refs are sources
  bool convergeAll = false;  // .aligned: all lanes of the warp that have not exited come together
  Space space = Space::Generic;
  Type type = Type::None;      // the first that is named
  uint8_t bytes = 0, vec = 1;  // of that type; the number of registers
  uint8_t x[8] = {};           // each instruction's own
  template <class F>
  void eachDestination(F visit) const {
    if (storesD) return;
    visit(d);
    for (size_t i = 0; ext && i < ext->refs.size(); ++i) visit(ext->refs[i]);
  }
};

// A special register, and what a lane finds in it.
struct Special {
  const char* name;
  uint64_t (*value)(const Warp&, unsigned lane, unsigned dimension);
  bool changes = false;  // while the warp runs
};
const Special* findSpecial(const std::string& name, unsigned* dimension);  // nullptr: there is none
extern const Special kSharedAddress;                                       // where the CTA's window begins

struct SpecialUse {
  const Special* special;
  uint32_t off;
  uint8_t bytes, dimension;
  uint32_t add;
};

struct Coverage {  // of one kernel of one module text over all launches: see profile.cpp. It outlives the module
  size_t module = 0;
  std::vector<std::string> rows;              // of each instruction
  std::vector<uint64_t> hits, taken, before;  // by warps; of a predicated one with a lane to run for; hits at launch
};

struct Kernel {
  std::string name;
  Module* module = nullptr;
  std::vector<Inst> code;
  std::vector<const PInst*> source;  // parallel to code
  std::vector<uint8_t> leader;       // parallel to code: starts a basic block
  std::deque<Extra> extras;
  std::vector<std::shared_ptr<void>> owned;  // what instructions keep beyond an Extra
  std::vector<uint64_t> constants;           // lane vectors
  std::vector<SpecialUse> specials;
  uint32_t regBytes = 0, numIds = 1, localBytes = 16, paramBytes = 0;
  uint32_t staticShared = 0;                               // bytes after the reserved first 1 KB
  std::vector<std::pair<uint32_t, uint32_t>> paramLayout;  // offset, bytes
  uint8_t* params = nullptr;                               // simulated parameter bank
  Coverage* coverage = nullptr;
  std::string place(size_t pc) const;  // source position and PTX line, for reports
};

// for (int lane : lanesOf(mask))
struct LanesOf {
  uint32_t left;
  int operator*() const { return __builtin_ctz(left); }
  LanesOf& operator++() { return left &= left - 1, *this; }
  bool operator!=(LanesOf o) const { return left != o.left; }
  LanesOf begin() const { return *this; }
  LanesOf end() const { return {0}; }
};
inline LanesOf lanesOf(uint32_t mask) { return {mask}; }

// Coordinate d of what has this number in a block of that size: x runs fastest.
inline unsigned coordinate(const unsigned (&size)[3], uint64_t number, unsigned d) {
  for (unsigned i = 0; i < d; ++i) number /= size[i];
  return (unsigned)(number % size[d]);
}

std::string where(const Warp& w, const Inst& in, int lane);

enum class Wait : uint8_t { None, Converge, Barrier, Poll };
using Describe = std::string (*)(Warp&, const Inst&);  // what a warp waits for
struct Fragment {                                      // a set of lanes at one program counter
  uint32_t pc = 0, mask = 0;
  Wait wait = Wait::None;
  uint64_t pollEpoch = 0;  // Poll: launch epoch when it last looked
  Describe describe = nullptr;
  uint64_t age = 0;
  uint32_t shownPc = 0;                    // Barrier: the instruction it waits at (pc is already past it)
  bool mayGiveUp = false, giveUp = false;  // a wait that may return false, and now shall
  std::vector<uint32_t> calls;             // that have not returned, outermost first
};

// Asynchronous operations of a warp's threads that nobody has waited for yet. A commit group is a number per thread.
struct OpTrack {
  std::vector<std::shared_ptr<struct AsyncOp>> ops;
  uint32_t committed[kLanes] = {};  // groups closed so far
};

struct Warp {
  struct Cta* cta = nullptr;
  struct Launch* launch = nullptr;
  const Kernel* kernel = nullptr;
  unsigned index = 0;                     // in the CTA
  uint32_t live = 0;                      // lanes that exist and have not exited
  uint8_t* base[2] = {nullptr, nullptr};  // registers, constants
  uint32_t* valid = nullptr;
  uint8_t *local = nullptr, *localValid = nullptr;  // 32 x localBytes
  std::vector<Fragment> frags;                      // frags[cur] runs
  unsigned cur = 0;
  uint32_t pc = 0, next = 0;  // of the running fragment
  uint32_t stopPc = 0;        // where another fragment waits ahead
  bool reschedule = false;
  uint64_t executed = 0;
  uint32_t carry = 0;  // CC.CF per lane
  OpTrack bulk, cp, wgmma;
  std::vector<uint8_t> inflight;  // by validity id: 1 accumulator, 2 A register of a wgmma not yet waited for
  unsigned numInflight = 0;
  std::vector<uint8_t> unfenced;  // by validity id: a register of a wgmma written since the last wgmma.fence
  uint64_t wgmmaCount = 0;
  std::shared_ptr<struct RaceWarp> race;
  uint32_t agent = 0;                            // race detector: its number in the grid
  uint32_t laneTime = 1, laneNews[kLanes] = {};  // now, and when each lane last heard of the others
  unsigned maxnreg = 0;
  uint64_t sliceStamp = 0;
  uint32_t clusterArrived = 0;  // lanes between barrier.cluster.arrive and .wait
  uint64_t clusterPhase[kLanes] = {};

  template <class T>
  T* ptr(Ref r) {
    return reinterpret_cast<T*>(base[r.off >> 31] + (r.off & ~(Ref::kConstBit | Ref::kNegated)));
  }
  uint32_t& pred(Ref r) { return *ptr<uint32_t>(r); }
  uint32_t predicate(Ref r) { return pred(r) ^ (r.off & Ref::kNegated ? kAll : 0); }
  uint32_t validOf(Ref r) const { return valid[r.id]; }
  void setValid(Ref d, uint32_t m, uint32_t v) { valid[d.id] = (valid[d.id] & ~m) | (v & m); }
  void setPred(Ref d, uint32_t m, uint32_t value, uint32_t v) {
    pred(d) = (pred(d) & ~m) | (value & m);
    setValid(d, m, v);
  }

  bool run(unsigned quantum);  // false: nothing to run now
  bool schedule();
  Fragment& frag() { return frags[cur]; }

  // ---- used by instruction handlers
  Fragment& jump(uint32_t mask, uint32_t target);  // some of the running lanes go there, as this fragment
  void exitLanes(uint32_t mask);
  void block(Wait kind, Describe describe = nullptr);  // retry this instruction later
  template <class... Parts>
  [[noreturn]] void fail(const Inst& in, int lane, const Parts&... what) {
    throw Error(what..., "\n  at ", where(*this, in, lane));
  }
  void needValid(const Inst& in, Ref r, uint32_t mask, const char* role);
};

inline uint32_t pcOf(const Warp& w, const Inst& in) { return (uint32_t)(&in - w.kernel->code.data()); }

struct NamedBarrier {
  unsigned arrived = 0, expected = 0;  // threads; 0 are expected: all of the CTA
  struct Waiter {
    Warp* warp;
    uint32_t mask;
    const Inst* inst;
  };
  std::vector<Waiter> waiting;
  std::vector<uint32_t> lanes;  // per warp: who has arrived in this phase
  bool redAnd = true;
  uint32_t redCount = 0;
  std::shared_ptr<struct RaceClock> clock;  // race detector: what the arrivals release
};

struct Mbarrier {
  uint32_t expected = 0, nextExpected = 0;
  int64_t pending = 0, tx = 0;
  uint64_t phase = 0, txSeen = 0;  // and the bytes that arrived in this phase, for reports
  uint32_t initBy = 0, initTime = 0, initLane = 0, initLaneTime = 0;  // race detector: warp of the grid and its lane
  std::shared_ptr<RaceClock> clock, done;  // race detector: of the open phase, of the last completed one
  std::shared_ptr<struct RaceCompletion> open, completion;  // of the same phases' asynchronous operations
};

struct alignas(64) Line {
  uint8_t bytes[64];
};

struct Cta {
  Launch* launch = nullptr;
  struct Cluster* cluster = nullptr;
  unsigned id[3] = {0, 0, 0}, rank = 0;
  uint64_t linear = 0;
  uint8_t *smem = nullptr, *smemValid = nullptr;  // smemBytes, the first 1 KB reserved
  uint32_t smemBytes = 0;
  std::vector<Warp> warps;
  NamedBarrier bars[16];
  std::vector<uint8_t> hasMbar;        // per 8 bytes of shared memory
  std::map<uint32_t, Mbarrier> mbars;  // by offset
  unsigned liveThreads = 0;
  int regPool = 0;     // registers free for setmaxnreg
  struct WgmmaOrder {  // the four warps of a warpgroup issue the same sequence
    uint64_t base = 0;
    std::deque<std::shared_ptr<AsyncOp>> issued;  // and the one before, which the next follows
  };
  std::vector<WgmmaOrder> wgmma;
  std::shared_ptr<struct RaceShadow> shadow;  // race detector
  std::list<std::vector<Line>> memory;        // what the pointers in here and in its warps point to
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  unsigned id[3] = {0, 0, 0}, liveThreads = 0;
  unsigned arrived = 0;                         // threads at barrier.cluster
  std::shared_ptr<RaceClock> clock, done, met;  // race detector
  uint64_t barrierPhase = 0;
  std::list<std::shared_ptr<AsyncOp>> pending;  // issued, not yet performed
};

// A copy or matrix operation that proceeds beside the threads. Its steps happen some time between issue and wait.
struct AsyncOp {
  virtual ~AsyncOp() = default;
  virtual bool step() = 0;              // false: more to do
  bool done = false, readDone = false;  // finished; its source may be overwritten
  Warp* warp = nullptr;
  const Inst* inst = nullptr;
  uint32_t mask = 0;                            // threads it belongs to
  uint32_t group[kLanes] = {};                  // the commit group in which each of them put it
  std::vector<std::shared_ptr<AsyncOp>> after;  // performed before this one
  uint32_t id = 0;                              // race detector
  std::shared_ptr<RaceClock> clock;             // the same: what those that issue it release
  bool generic = false;                         // works through the generic proxy
  std::vector<uint32_t> covers;                 // operations whose end its signal tells of
  virtual void waited(uint32_t) {}              // these lanes have waited for it: what it did is as if they had now
};

// Each as it is reported, and its field.
#define COUNTERS(X)                                                                                               \
  X(warp_instructions, warpInst), X(thread_instructions, threadInst), X(global_read, globalRead),                 \
      X(global_write, globalWrite), X(atomic, atomics), X(shared_read, sharedRead), X(shared_write, sharedWrite), \
      X(shared_wavefronts, sharedWavefronts), X(shared_ideal, sharedIdeal), X(tma_read, tmaRead),                 \
      X(tma_write, tmaWrite), X(wgmma, wgmma), X(wgmma_cycles, wgmmaCycles), X(mma, mma), X(branches, branches),  \
      X(divergent, divergent), X(barriers, barriers)
struct Counters {
#define FIELD(name, field) field = 0
  uint64_t COUNTERS(FIELD);
#undef FIELD
};

enum class Timing : uint8_t { Early, Late, Random };
enum class Order : uint8_t { Forward, Reverse, Random };
struct Options {
  uint64_t seed = 0;              // 0: fixed round robin
  Timing timing = Timing::Early;  // when asynchronous work happens
  unsigned sms = 132;
  Order order = Order::Forward;   // in which CTAs start
  bool eager = false;             // all resident CTAs advance together
  bool detect = true;             // uninitialised reads and races
  uint32_t approximate = 0;       // not 0: approximate functions err as the ISA allows, differently for each value
  bool hardwareRounding = false;  // of matrix products, see TensorCore; else float32 in order of k
  uint64_t maxIdle = 200000000;   // thread instructions without any effect before a launch is called stuck
  bool verbose = false;
};

struct Launch {
  Kernel* kernel = nullptr;
  unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, clusterDim[3] = {1, 1, 1};
  bool explicitCluster = false;
  uint32_t dynShared = 0;
  unsigned threads = 1, warpsPerCta = 1, ctasPerCluster = 1, regsPerThread = 0;
  uint64_t epoch = 1;  // counts effects: what a waiting fragment may be waiting for
  uint64_t clock = 0;
  std::mt19937_64 rng;
  Options opt;
  Counters n;
  std::shared_ptr<struct RaceState> race;
  // Launched early (programmatic stream serialization): what the launch before used is to be touched only after
  // griddepcontrol.wait. `waited`: somebody has, so that this launch ends after the one before. `signalled`: by
  // griddepcontrol.launch_dependents, so that the next one may begin before this one ends.
  bool early = false, waited = false, signalled = false;
  std::vector<std::unique_ptr<Cluster>> resident;
  uint64_t numClusters = 0;
  unsigned maxResident = 1;  // clusters

  enum Progress { Finished, Blocked, Idle, Slice };
  void run();
  void progress() { ++epoch; }
  void issue(std::shared_ptr<AsyncOp> op);
  void performNow(AsyncOp& op, bool all);

 private:
  void startCluster(uint64_t index);
  void startCta(Cluster& c);
  Progress runCluster(Cluster& c);
  bool performSome(Cluster& c);
  template <class F>
  void eachFragment(F visit);
  bool giveUpWaits();
  [[noreturn]] void reportDeadlock();
};

constexpr uint32_t kSharedReserved = 1024, kMaxShared = 232448, kSharedPerSm = 233472;  // bytes
constexpr unsigned kRegisters = 65536, kThreadsPerSm = 2048;                            // of an SM

std::unique_ptr<Kernel> decodeKernel(Module& m, Func& f);
uint64_t translate(uint64_t address, uint64_t bytes);  // of a declared buffer of the host -> of its copy, or 0

void profileStart(Kernel& k);  // before a launch
std::string instructionCounts();
std::string coverageOf(const std::string& kernel);

void checkExit(Cta& cta);  // what a CTA must not leave behind

}  // namespace ptxsim
