// mbarrier and cp.async (PTX ISA 9.7.13.15, 9.7.9.25.3), st.async and red.async.
#include "async.h"

namespace ptxsim {

// The address operand as a shared::cluster address. `own`: in the own CTA, where it may come without its rank.
static uint32_t sharedAddress(Warp& w, const Inst& in, int lane, bool own) {
  const uint64_t a = laneAddress(w, in, lane);
  w.needValid(in, in.a, 1u << lane, "address");
  if (in.space != Space::Shared && !inShared(a))
    w.fail(in, lane, "a generic address that must be in shared memory is not");
  return own ? inCta((uint32_t)a, w.cta->rank) : (uint32_t)a;
}
Mbarrier& mbarrierAt(Warp& w, const Inst& in, int lane, uint32_t address) {
  Place p = locateShared(w, in, lane, address, 8, Kind::Read, 8, false);
  auto found = p.cta->mbars.find(p.offset);
  if (found == p.cta->mbars.end())
    w.fail(in, lane, "no mbarrier has been initialised at shared offset ", p.offset, " of CTA rank ", p.cta->rank);
  return found->second;
}

// So many bytes are expected, or have come when tx is negative, and n threads arrive: perhaps the phase is complete.
static void arrive(Warp& w, const Inst& in, int lane, Mbarrier& b, int64_t tx, uint32_t n) {
  b.tx += tx;
  if (tx < 0) b.txSeen -= (uint64_t)tx;
  if (b.tx > 0xfffff || b.tx < -0xfffff)
    w.fail(in, lane, "the mbarrier's transaction count ", b.tx, " is outside +-(2^20 - 1)");
  if (b.pending < (int64_t)n)
    w.fail(in, lane, "mbarrier arrival without a pending count: ", n, " arrive, ", b.pending, " of ", b.expected,
           " are pending, ", b.tx, " bytes are outstanding");
  b.pending -= n;
  if (b.pending != 0 || b.tx != 0) return;
  ++b.phase;
  b.pending = b.expected = b.nextExpected;
  b.txSeen = 0;
  b.done = std::exchange(b.clock, nullptr);
  b.completion = std::exchange(b.open, nullptr);
  w.launch->progress();
}
void completeOn(const AsyncOp& op, int lane, uint32_t address, uint32_t bytes, uint32_t arrivals) {
  Mbarrier& b = mbarrierAt(*op.warp, *op.inst, lane, address);
  raceAsyncSignal(op, b);
  arrive(*op.warp, *op.inst, lane, b, -(int64_t)bytes, arrivals);
}

// ---- operations in flight

void track(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t) {
  op->warp = &w;
  op->inst = &in;
  op->mask = mask;
  if (!t) return;
  for (unsigned i = 0; i < kLanes; ++i) op->group[i] = t->committed[i];
  t->ops.push_back(std::move(op));
}
void launchOp(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t) {
  track(w, in, mask, op, t);
  raceRelease(w, op->clock);
  raceIssue(*op);
  w.launch->issue(std::move(op));
}
bool waitGroups(Warp& w, OpTrack& t, uint32_t m, uint32_t n, bool reads, bool all) {
  auto wanted = [&](const AsyncOp& op) {
    for (int i : lanesOf(op.mask & m))
      if (all || op.group[i] + n < t.committed[i]) return true;
    return false;
  };
  for (auto& op : t.ops)
    if (wanted(*op) && !op->done && !(reads && op->readDone)) {
      w.block(Wait::Poll,
              [](Warp&, const Inst&) -> std::string { return "waits for asynchronous operations that cannot finish"; });
      return false;
    }
  for (auto& op : t.ops)
    if (wanted(*op)) {
      raceWaited(w, *op, reads);
      op->waited(op->mask & m);
      if (!reads) op->mask &= ~m;
    }
  auto over = [](auto& op) { return op->mask == 0; };
  t.ops.erase(std::remove_if(t.ops.begin(), t.ops.end(), over), t.ops.end());
  return true;
}

namespace {

// ---- mbarrier. a: address, x[4] perhaps in another CTA; b: operand

void initBarrier(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    const uint32_t count = lane32(w, in, in.b, i, "mbarrier count");
    Place p = locateShared(w, in, i, sharedAddress(w, in, i, true), 8, Kind::Write, 8, true);
    if (count < 1 || count > 0xfffff) w.fail(in, i, "an mbarrier count of ", count, " is not in 1..2^20-1");
    uint8_t& live = w.cta->hasMbar[p.offset >> 3];
    if (live) w.fail(in, i, "mbarrier.init of a live mbarrier (it needs mbarrier.inval first)");
    live = true;
    Mbarrier& b = w.cta->mbars[p.offset];
    b.pending = b.expected = b.nextExpected = count;
    memset(p.p, 0, 8);
    memset(p.valid, 1, 8);
    raceMbarrierInit(w, i, b);
    racePlace(w, in, p, 8, Kind::Write);
  }
  w.launch->progress();
}
void invalBarrier(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    const uint32_t a = sharedAddress(w, in, i, true), offset = a & 0xffffff;
    mbarrierAt(w, in, i, a);
    w.cta->mbars.erase(offset);
    w.cta->hasMbar[offset >> 3] = false;
    memset(w.cta->smemValid + offset, 0, 8);
  }
  w.launch->progress();
}

// f(lane, mbarrier, operand) does something to the mbarrier of every lane.
template <class F>
void atBarriers(Warp& w, const Inst& in, uint32_t m, F f) {
  for (int i : lanesOf(m)) {
    const uint32_t a = sharedAddress(w, in, i, in.space == Space::Shared && !in.x[4]);
    if (in.space == Space::Generic && (a >> 24) != w.cta->rank)
      w.fail(in, i, "a generic mbarrier address must be in the own CTA");
    Mbarrier& b = mbarrierAt(w, in, i, a);
    raceMbarrierUse(w, in, i, b);
    raceRemote(w, in, i, *w.cta->cluster->ctas[a >> 24], nullptr);
    f(i, b, in.b ? lane32(w, in, in.b, i, "mbarrier operand") : 1);
  }
  w.launch->progress();
}
void transaction(Warp& w, const Inst& in, uint32_t m) {  // x[0]: 0 expect, 1 complete
  const int64_t sign = in.x[0] ? -1 : 1;
  atBarriers(w, in, m, [&](int i, Mbarrier& b, uint32_t n) { arrive(w, in, i, b, sign * n, 0); });
}
void arriveBarrier(Warp& w, const Inst& in, uint32_t m) {  // x[0] drop, x[1] expect_tx, x[2] noComplete, x[3] relaxed
  uint64_t state[kLanes] = {0};
  atBarriers(w, in, m, [&](int i, Mbarrier& b, uint32_t n) {
    state[i] = (b.phase & 0xffffffff) | (uint64_t)b.pending << 32;
    const uint32_t count = in.x[1] ? 1 : n;
    if (in.x[0] && b.nextExpected < count) w.fail(in, i, "arrive_drop below zero");
    if (in.x[0]) b.nextExpected -= count;
    if (in.x[2] && b.pending == count) w.fail(in, i, "mbarrier.arrive.noComplete completes the phase");
    raceRelease(w, b.clock, !in.x[3]);
    arrive(w, in, i, b, in.x[1] ? n : 0, count);
  });
  if (in.d) setLanes<uint64_t>(w, in.d, m, kAll, [&](int i) { return state[i]; });
}
void decodeArrive(Dec& d) {  // the result is optional: `mbarrier.arrive... [addr]`
  const bool state = d.arg(0).kind != Operand::Address;
  d.wantArgs(1u + state, 2u + state);
  d.operands(state ? "d:b64 [a] b:u32?" : "[a] b:u32?");
  if (state && d.arg(0).kind != Operand::Sink && d.out.x[4]) d.fail("a remote arrive gives no state");
  if (d.out.x[1] && !d.out.b) d.fail("a transaction count is required");
  d.out.fn = arriveBarrier;
}

template <bool kParity>
std::string describeWait(Warp& w, const Inst& in) {
  const int i = firstLane(w.frag().mask);
  const uint32_t offset = (uint32_t)laneAddress(w, in, i) & 0xffffff;
  if (!w.cta->hasMbar[offset >> 3]) return "waits for an mbarrier";
  const Mbarrier& b = w.cta->mbars[offset];
  return cat("waits for mbarrier at shared offset ", offset, " ",
             kParity ? cat("parity ", lane32(w, in.b, (unsigned)i) & 1) : "", " (phase ", b.phase, ": ",
             b.expected - b.pending, " of ", b.expected, " arrivals, ", b.txSeen, " bytes came, ", b.tx,
             " outstanding)");
}
// test_wait and try_wait. x[0] try, x[1] relaxed
template <bool kParity>
void waitBarrier(Warp& w, const Inst& in, uint32_t m) {
  uint32_t ok = 0;
  Fragment& f = w.frag();
  w.needValid(in, in.b, m, "mbarrier phase");
  for (int i : lanesOf(m)) {
    const uint32_t a = sharedAddress(w, in, i, false);
    if ((a >> 24) != w.cta->rank && (a >> 24) != 0)
      w.fail(in, i, "a thread can wait only for an mbarrier of its own CTA");
    Mbarrier& b = mbarrierAt(w, in, i, inCta(a, w.cta->rank));
    raceMbarrierUse(w, in, i, b);
    const uint32_t was = lane32(w, in.b, (unsigned)i * (kParity ? 1 : 2)), now = (uint32_t)b.phase;
    if (!kParity && was != now && was + 1 != now)
      w.fail(in, i, "the mbarrier state is of phase ", was, ", which is neither the current phase ", now,
             " nor the one before");
    if (kParity ? !((was ^ now) & 1) : was == now) continue;
    ok |= 1u << i;
    raceWaited(w, b, !in.x[1]);
  }
  f.mayGiveUp = !ok && !(in.x[0] && f.giveUp);
  f.giveUp = false;
  if (f.mayGiveUp) {  // a try waits; a test gives way, and comes back when something has happened
    w.block(Wait::Poll, in.x[0] ? describeWait<kParity> : nullptr);
    if (in.x[0]) return;
    w.next = w.pc + 1;
  }
  if (ok) laneSync(w, ok);
  w.setPred(in.d, m, ok, kAll);
}
LANE(uint32_t, PendingCount, (uint64_t state)) { return (uint32_t)(state >> 32); }

// ---- cp.async

struct CpAsync : AsyncOp {
  Place from[kLanes], to[kLanes];
  uint32_t have[kLanes];
  bool step() override {
    for (int i : lanesOf(mask)) {
      raceAsync(*this, from[i], have[i], Kind::Read);
      raceAsync(*this, to[i], inst->bytes, Kind::Write);
      if (have[i]) memcpy(to[i].p, from[i].p, have[i]);
      memset(to[i].p + have[i], 0, inst->bytes - have[i]);
      memset(to[i].valid, 1, inst->bytes);
    }
    return true;
  }
  void waited(uint32_t m) override {
    for (int i : lanesOf(m)) laneAsync(*warp, *inst, i, to[i], inst->bytes, Kind::Write);
  }
};
// a: shared, second address: global, b: src-size, c: predicate that ignores the source
void cpAsync(Warp& w, const Inst& in, uint32_t m) {
  auto op = std::make_shared<CpAsync>();
  op->generic = true;
  w.needValid(in, in.a, m, "address");
  for (int i : lanesOf(m)) {
    op->to[i] = locateShared(w, in, i, (uint32_t)laneAddress(w, in, i), in.bytes, Kind::Write, in.bytes, true);
    uint32_t& have = op->have[i] = in.b ? lane32(w, in.b, (unsigned)i) : in.bytes;
    if (in.c && (w.predicate(in.c) >> i) & 1) have = 0;
    if (have > in.bytes) w.fail(in, i, "cp.async: src-size ", have, " exceeds cp-size ", (unsigned)in.bytes);
    if (have) {
      const uint64_t g = laneAddress(w, in, in.ext->second, i);
      if (g % in.bytes) w.fail(in, i, "misaligned cp.async source");
      op->from[i] = locateGlobal(w, in, i, g, have, Kind::Read, 1);
    }
    w.launch->n.globalRead += have;
    w.launch->n.sharedWrite += in.bytes;
    laneAsync(w, in, i, op->to[i], in.bytes, Kind::Write);
  }
  launchOp(w, in, m, op, &w.cp);
}
void decodeCpAsync(Dec& d) {
  d.takePrefix("L2::");
  d.wantArgs(3, d.out.x[1] ? 5 : 4);
  const int64_t size = d.intArg(2);
  if (size != 16 && (d.out.x[0] || (size != 4 && size != 8))) d.fail("cp-size must be 16, or 4 or 8 with .ca");
  d.operands("[a] [e]");
  if (d.argc() - d.out.x[1] > 3) {
    const Operand& o = d.arg(3);
    if (o.kind == Operand::Register && d.fn.regs[(size_t)o.reg].type == Type::Pred)
      d.out.c = d.pred(o);
    else
      d.out.b = d.src(o, Type::U32);
  }
  d.out.bytes = (uint8_t)size;
  d.out.fn = cpAsync;
}

struct CpArrive : AsyncOp {
  uint32_t address[kLanes];
  bool step() override {
    for (int i : lanesOf(mask)) completeOn(*this, i, address[i], 0, 1);
    return true;
  }
};
void cpArrive(Warp& w, const Inst& in, uint32_t m) {  // x[0] noinc
  auto op = std::make_shared<CpArrive>();
  for (int i : lanesOf(m)) {
    op->address[i] = sharedAddress(w, in, i, true);
    Mbarrier& b = mbarrierAt(w, in, i, op->address[i]);
    raceMbarrierUse(w, in, i, b);
    if (!in.x[0]) ++b.pending;
  }
  for (auto& earlier : w.cp.ops)
    if (earlier->mask & m) op->after.push_back(earlier), op->covers.push_back(earlier->id);
  launchOp(w, in, m, op, nullptr);
}

// ---- st.async and red.async: one store with its own completion

struct StAsync : AsyncOp {
  uint32_t address = 0, barrier = 0, bytes = 0;
  uint8_t data[32];
  int lane = 0, operation = -1;
  bool step() override {
    Place p = locateShared(*warp, *inst, lane, address, bytes, Kind::Write, 1, false);
    raceAsync(*this, p, bytes, Kind::Write);
    combine(operation, inst->type, p.p, data, bytes);
    memset(p.valid, 1, bytes);
    completeOn(*this, lane, barrier, bytes);
    return true;
  }
};
// a: destination, second address: barrier, ext->refs: values, x[0] operation
template <bool kReduces>
void stAsync(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    auto op = std::make_shared<StAsync>();
    op->generic = true;
    op->lane = i;
    if (kReduces) op->operation = in.x[0];
    op->address = (uint32_t)laneAddress(w, in, i);
    op->barrier = (uint32_t)laneAddress(w, in, in.ext->second, i);
    for (const Ref& r : in.ext->refs) {
      w.needValid(in, r, 1u << i, "value of an asynchronous store");
      const uint64_t v = laneBits(w, r, in.bytes, i);
      memcpy(op->data + op->bytes, &v, in.bytes);
      op->bytes += in.bytes;
    }
    Cta& target = *locateShared(w, in, i, op->address, op->bytes, Kind::Write, op->bytes, false).cta;
    if ((op->address >> 24) != (op->barrier >> 24))
      w.fail(in, i, "the destination and its mbarrier are in different CTAs");
    raceMbarrierUse(w, in, i, mbarrierAt(w, in, i, op->barrier));
    launchOp(w, in, 1u << i, op, nullptr);
    raceRemote(w, in, i, target, op.get());
  }
}

const Forms kForms = {
    {"mbarrier", "pending_count (b64)", "d:u32 a:b64", lanes<PendingCount>()},
    {"mbarrier", "arrive|arrive_drop expect_tx? noComplete? relaxed? (release) (cta|cluster|gpu|sys) space (b64)",
     nullptr, decodeArrive},
    {"mbarrier", "test_wait|try_wait relaxed? parity (acquire) (cta|cluster|gpu|sys) space (b64)",
     "d:pred [a] b:u32 c:u32?", waitBarrier<true>},
    {"mbarrier", "test_wait|try_wait relaxed? (acquire) (cta|cluster|gpu|sys) space (b64)", "d:pred [a] b:b64 c:u32?",
     waitBarrier<false>},
    {"mbarrier", "expect_tx|complete_tx (relaxed) (cta|cluster|gpu|sys) space (b64)", "[a] b:u32", transaction},
    {"mbarrier", "init space (b64)", "[a] b:u32", initBarrier},
    {"mbarrier", "inval space (b64)", "[a]", invalBarrier},
    {"cp", "async commit_group", "", commitGroup<&Warp::cp>},
    {"cp", "async wait_group", "imm", waitGroup<&Warp::cp>},
    {"cp", "async wait_all", "", waitGroup<&Warp::cp, true>},
    {"cp", "async mbarrier arrive noinc? space (b64)", "[a]", cpArrive},
    {"cp", "async ca|cg L2::cache_hint? shared|shared::cta global", nullptr, decodeCpAsync},
    {"st", "async (weak|relaxed) (cluster) shared::cluster (mbarrier::complete_tx::bytes) vector type", "[a] {e} [e]",
     stAsync<false>},
    {"red",
     "async (relaxed) (cluster) add|min|max|and|or|xor|inc|dec shared::cluster (mbarrier::complete_tx::bytes) type",
     "[a] {e} [e]", stAsync<true>},
};

}  // namespace
}  // namespace ptxsim
