// mbarrier and cp.async (PTX ISA 9.7.13.15, 9.7.9.25.3), st.async and red.async.
#include "async.h"

namespace ptxsim {

uint32_t sharedOf(Warp& w, const Inst& in, int lane, Space space, uint64_t a) {
  if (space == Space::Shared) return (uint32_t)a;
  if (!inShared(a)) w.fail(in, lane, "a generic address that must be in shared memory is not");
  return (uint32_t)a;
}
// An address in the own CTA may come without its rank.
static uint32_t withRank(Warp& w, uint32_t a, bool cluster) {
  return cluster ? a : (a & 0xffffffu) | w.cta->rank << 24;
}

AddressOperand addressOperand(Dec& d, const Operand& o) {
  AddressOperand a;
  a.ref = d.address(o, &a.offset);
  a.bytes = d.out.x[5];
  return a;
}

Mbarrier& mbarrierAt(Warp& w, const Inst& in, int lane, uint32_t address, Cta** owner) {
  Place p = locateShared(w, in, lane, address, 8, Kind::Read, 8, false);
  uint16_t i = p.cta->mbarIndex[p.offset >> 3];
  if (!i)
    w.fail(in, lane, "no mbarrier has been initialised at shared offset ", p.offset, " of CTA rank ", p.cta->rank);
  if (owner) *owner = p.cta;
  return p.cta->mbars[i];
}

static void settle(Launch& l, Mbarrier& b) {
  if (b.pending == 0 && b.tx == 0) {
    ++b.phase;
    b.expected = b.nextExpected;
    b.pending = b.expected;
    b.txSeen = 0;
    racePhase(b);
    l.progress();
  }
}
static void addTx(Warp& w, const Inst& in, int lane, Mbarrier& b, int64_t n) {
  b.tx += n;
  if (b.tx > 0xfffff || b.tx < -0xfffff)
    w.fail(in, lane, "the mbarrier's transaction count ", b.tx, " is outside +-(2^20 - 1)");
}
static void arrive(Warp& w, const Inst& in, int lane, Mbarrier& b, uint32_t n) {
  if (b.pending < (int64_t)n)
    w.fail(in, lane, "mbarrier arrival without a pending count: ", n, " arrive, ", b.pending, " of ", b.expected,
           " are pending, ", b.tx, " bytes are outstanding");
  b.pending -= n;
}
void completeTx(Warp& w, const Inst& in, int lane, uint32_t address, uint32_t bytes, const AsyncOp* op) {
  Mbarrier& b = mbarrierAt(w, in, lane, address);
  addTx(w, in, lane, b, -(int64_t)bytes);
  b.txSeen += bytes;
  if (op) raceAsyncSignal(*op, b);
  settle(*w.launch, b);
}

// ---- operations in flight

void track(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t) {
  op->cluster = w.cta->cluster;
  op->warp = &w;
  op->inst = &in;
  op->mask = mask;
  if (!t) return;
  for (unsigned i = 0; i < kLanes; ++i) op->group[i] = t->committed[i];
  t->ops.push_back(std::move(op));
}
void launchOp(Warp& w, const Inst& in, uint32_t mask, std::shared_ptr<AsyncOp> op, OpTrack* t) {
  track(w, in, mask, op, t);
  raceIssue(w, *op);
  w.launch->issue(std::move(op));
}
void commitGroups(OpTrack& t, uint32_t m) {
  for (int i : lanesOf(m)) ++t.committed[i];
}
static std::string describeGroup(Warp&, const Inst&) { return "waits for asynchronous operations that cannot finish"; }
bool waitGroups(Warp& w, OpTrack& t, uint32_t m, uint32_t n, bool reads, bool all) {
  auto wanted = [&](const AsyncOp& op) {
    for (int i : lanesOf(op.mask & m)) {
      if (all || op.group[i] + n < t.committed[i]) return true;
    }
    return false;
  };
  for (auto& op : t.ops)
    if (wanted(*op) && !(reads ? op->readDone || op->done : op->done)) {
      w.block(Wait::Poll, describeGroup);
      return false;
    }
  for (size_t i = 0; i < t.ops.size();) {
    if (!wanted(*t.ops[i])) {
      ++i;
      continue;
    }
    raceWaited(w, *t.ops[i], reads);
    t.ops[i]->waited(t.ops[i]->mask & m);
    if (reads) {
      ++i;
      continue;
    }
    t.ops[i]->mask &= ~m;
    if (t.ops[i]->mask == 0)
      t.ops.erase(t.ops.begin() + (long)i);
    else
      ++i;
  }
  return true;
}

namespace {

// ---- mbarrier. x[0] operation, x[1] shared::cluster, x[2] flags; a: address, b, c: operands, d: result

void initBarrier(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    uint32_t a = withRank(w, sharedOf(w, in, i, in.space, laneAddress(w, in, i)), false);
    uint32_t count = lane32(w, in.b, (unsigned)i);
    w.needValid(in, in.b, 1u << i, "mbarrier count");
    Place p = locateShared(w, in, i, a, 8, Kind::Write, 8, true);
    if (count < 1 || count > 0xfffff) w.fail(in, i, "an mbarrier count of ", count, " is not in 1..2^20-1");
    uint16_t& index = p.cta->mbarIndex[p.offset >> 3];
    if (index) w.fail(in, i, "mbarrier.init of a live mbarrier (it needs mbarrier.inval first)");
    for (uint16_t k = 1; k < p.cta->mbars.size() && !index; ++k)
      if (!p.cta->mbars[k].live) index = k;
    if (!index) {
      index = (uint16_t)p.cta->mbars.size();
      p.cta->mbars.emplace_back();
    }
    Mbarrier& b = p.cta->mbars[index] = Mbarrier();
    b.live = true;
    b.expected = b.nextExpected = count;
    b.pending = count;
    memset(p.p, 0, 8);
    memset(p.valid, 1, 8);
    raceMbarrierInit(w, i, b);
    racePlace(w, in, p, 8, Kind::Write);
  }
  w.launch->progress();
}
void invalBarrier(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    uint32_t a = withRank(w, sharedOf(w, in, i, in.space, laneAddress(w, in, i)), false);
    Cta* cta;
    Mbarrier& b = mbarrierAt(w, in, i, a, &cta);
    b = Mbarrier();
    cta->mbarIndex[(a & 0xffffff) >> 3] = 0;
    memset(cta->smemValid + (a & 0xffffff), 0, 8);
  }
  w.launch->progress();
}

enum { Expect = 1, Complete = 2, ArriveOp = 4, Drop = 8, NoComplete = 16, HasCount = 32, Relaxed = 64 };
void arriveBarrier(Warp& w, const Inst& in, uint32_t m) {
  uint64_t state[kLanes] = {0};
  const unsigned flags = in.x[2];
  for (int i : lanesOf(m)) {
    uint32_t a =
        withRank(w, sharedOf(w, in, i, in.space, laneAddress(w, in, i)), in.x[1] || in.space == Space::Generic);
    if (in.space == Space::Generic && (a >> 24) != w.cta->rank)
      w.fail(in, i, "a generic mbarrier address must be in the own CTA");
    Cta* owner;
    Mbarrier& b = mbarrierAt(w, in, i, a, &owner);
    raceMbarrierUse(w, in, i, b);
    raceRemote(w, in, i, *owner, nullptr);
    uint32_t n = flags & (Expect | Complete | HasCount) ? lane32(w, in.b, (unsigned)i) : 1;
    if (flags & (Expect | Complete | HasCount)) w.needValid(in, in.b, 1u << i, "mbarrier operand");
    state[i] = (b.phase & 0xffffffff) | (uint64_t)b.pending << 32;
    if (flags & Expect) addTx(w, in, i, b, n);
    if (flags & Complete) addTx(w, in, i, b, -(int64_t)n), b.txSeen += n;
    if (flags & ArriveOp) {
      uint32_t count = flags & Expect ? 1 : n;
      if (flags & Drop) {
        if (b.nextExpected < count) w.fail(in, i, "arrive_drop below zero");
        b.nextExpected -= count;
      }
      arrive(w, in, i, b, count);
      raceRelease(w, b, !(flags & Relaxed));
    }
    if (!(flags & NoComplete))
      settle(*w.launch, b);
    else if (b.pending == 0)
      w.fail(in, i, "mbarrier.arrive.noComplete completes the phase");
  }
  if (in.x[3]) {
    storeLanes(w, in.d, state, m);
    w.setValid(in.d, m, kAll);
  }
  w.launch->progress();
}

std::string describeWait(Warp& w, const Inst& in) {
  int i = firstLane(w.frag().mask);
  uint32_t a = withRank(w, (uint32_t)laneAddress(w, in, i), false);
  uint16_t k = w.cta->mbarIndex[(a & 0xffffff) >> 3];
  if (!k) return "waits for an mbarrier";
  const Mbarrier& b = w.cta->mbars[k];
  std::string s = "waits for mbarrier at shared offset " + std::to_string(a & 0xffffff) + " ";
  if (in.x[3]) s += "parity " + std::to_string(lane32(w, in.b, (unsigned)i) & 1);
  return s + " (phase " + std::to_string(b.phase) + ": " + std::to_string(b.expected - b.pending) + " of " +
         std::to_string(b.expected) + " arrivals, " + std::to_string(b.txSeen) + " bytes came, " +
         std::to_string(b.tx) + " outstanding)";
}
// test_wait and try_wait. x[0] try, x[2] relaxed, x[3] parity
void waitBarrier(Warp& w, const Inst& in, uint32_t m) {
  uint32_t ok = 0;
  Fragment& f = w.frag();
  w.needValid(in, in.b, m, "mbarrier phase");
  for (int i : lanesOf(m)) {
    uint32_t a = sharedOf(w, in, i, in.space, laneAddress(w, in, i));
    if ((a >> 24) != w.cta->rank && (a >> 24) != 0)
      w.fail(in, i, "a thread can wait only for an mbarrier of its own CTA");
    Mbarrier& b = mbarrierAt(w, in, i, withRank(w, a, false));
    raceMbarrierUse(w, in, i, b);
    bool passed;
    if (in.x[3]) {
      passed = (b.phase & 1) != (lane32(w, in.b, (unsigned)i) & 1);
    } else {
      uint32_t was = (uint32_t)lane64(w, in.b, (unsigned)i), now = (uint32_t)b.phase;
      if (was != now && was + 1 != now)
        w.fail(in, i, "the mbarrier state is of phase ", was, ", which is neither the current phase ", now,
               " nor the one before");
      passed = was != now;
    }
    if (passed) {
      ok |= 1u << i;
      raceAcquire(w, b, !in.x[2]);
    }
  }
  if (!ok && in.x[0] && !f.giveUp) {
    w.block(Wait::Poll, describeWait);
    f.mayGiveUp = true;
    return;
  }
  f.mayGiveUp = f.giveUp = false;
  if (ok) laneSync(w, ok);
  w.setPred(in.d, m, ok, kAll);
  if (!ok && !in.x[0]) {  // a poll gives way, and comes back when something has happened
    const uint32_t next = w.next;
    w.block(Wait::Poll, nullptr);
    w.next = next;
    f.mayGiveUp = true;
  }
}
void pendingCount(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) r[i] = (uint32_t)(lane64(w, in.a, i) >> 32);
  storeLanes(w, in.d, r, m);
  w.setValid(in.d, m, w.validOf(in.a));
}

void decodeMbarrier(Dec& d) {
  if (d.take("pending_count")) {
    d.take("b64");
    d.wantArgs(2, 2);
    d.out.d = d.dst(0, 4);
    d.out.a = d.src(1, Type::B64);
    d.out.fn = pendingCount;
    return;
  }
  static const char* kOps[] = {"init",   "inval",       "expect_tx", "complete_tx",
                               "arrive", "arrive_drop", "test_wait", "try_wait"};
  int op = -1;
  for (int i = 4; i < 8; ++i)
    if (op < 0 && d.take(kOps[i])) op = i;
  for (int i = 0; i < 4; ++i)
    if (op < 0 && d.take(kOps[i])) op = i;
  unsigned flags = 0;
  if (op >= 4 && d.take("expect_tx")) flags |= Expect;
  if (d.take("noComplete")) flags |= NoComplete;
  bool parity = d.take("parity");
  if (d.take("relaxed")) flags |= Relaxed;
  d.takeOneOf({"release", "acquire"});
  d.takeOneOf({"cta", "cluster", "gpu", "sys"});
  d.out.space = Space::Generic;
  if (d.take("shared::cluster"))
    d.out.space = Space::Shared, d.out.x[1] = 1;
  else if (d.take("shared::cta") || d.take("shared"))
    d.out.space = Space::Shared;
  d.take("b64");
  switch (op) {
    case 0:
      d.wantArgs(2, 2);
      d.out.a = d.address(d.arg(0), &d.out.imm);
      d.out.b = d.src(1, Type::U32);
      d.out.fn = initBarrier;
      return;
    case 1:
      d.wantArgs(1, 1);
      d.out.a = d.address(d.arg(0), &d.out.imm);
      d.out.fn = invalBarrier;
      return;
    case 2:
    case 3:
      d.wantArgs(2, 2);
      d.out.a = d.address(d.arg(0), &d.out.imm);
      d.out.b = d.src(1, Type::U32);
      d.out.x[2] = (uint8_t)(flags | (op == 2 ? Expect : Complete));
      d.out.fn = arriveBarrier;
      return;
    case 4:
    case 5: {
      // the result is optional for a remote barrier: `mbarrier.arrive... [addr]`
      size_t at = d.arg(0).kind == Operand::Address ? 0 : 1;
      d.wantArgs(at + 1, at + 2);
      if (at && d.arg(0).kind != Operand::Sink) {
        if (d.out.x[1]) d.fail("a remote arrive gives no state");
        d.out.d = d.dst(0, 8);
        d.out.x[3] = 1;
      }
      d.out.a = d.address(d.arg(at), &d.out.imm);
      if (d.argc() > at + 1) {
        d.out.b = d.src(at + 1, Type::U32);
        flags |= HasCount;
      } else if (flags & Expect) {
        d.fail("a transaction count is required");
      }
      d.out.x[2] = (uint8_t)(flags | ArriveOp | (op == 5 ? Drop : 0));
      d.out.fn = arriveBarrier;
      return;
    }
    case 6:
    case 7:
      d.wantArgs(3, 4);
      d.out.d = d.predDst(d.arg(0));
      d.out.a = d.address(d.arg(1), &d.out.imm);
      d.out.b = d.src(2, parity ? Type::U32 : Type::B64);
      d.out.x[0] = op == 7;
      d.out.x[2] = flags & Relaxed ? 1 : 0;
      d.out.x[3] = parity;
      d.out.fn = waitBarrier;
      return;
    default: d.fail("unknown operation");
  }
}

// ---- cp.async

struct CpAsync : AsyncOp {
  uint32_t size = 0;
  uint8_t* from[kLanes];
  uint32_t to[kLanes], have[kLanes];
  bool step() override {
    Cta& c = *warp->cta;
    for (int i : lanesOf(lanes)) {
      raceAsyncShared(*this, c, to[i], size, Kind::Write);
      memcpy(c.smem + to[i], from[i], have[i]);
      memset(c.smem + to[i] + have[i], 0, size - have[i]);
      memset(c.smemValid + to[i], 1, size);
    }
    return true;
  }
  void waited(uint32_t m) override {
    for (; m; m &= m - 1) laneAsync(*warp, *inst, firstLane(m), *warp->cta, to[firstLane(m)], size, Kind::Write);
  }
  uint32_t lanes = 0;
};
// a: shared, ext->refs: {global, src-size or predicate}, v[0] global offset, v[1] kind of third operand
void cpAsync(Warp& w, const Inst& in, uint32_t m) {
  auto op = std::make_shared<CpAsync>();
  op->generic = true;
  op->size = in.bytes;
  op->lanes = m;
  w.needValid(in, in.a, m, "address");
  for (int i : lanesOf(m)) {
    uint32_t to = sharedOf(w, in, i, in.space, laneAddress(w, in, i));
    Place p = locateShared(w, in, i, to, in.bytes, Kind::Write, in.bytes, true);
    uint32_t have = in.bytes;
    if (in.ext->v[1] == 1) have = lane32(w, in.ext->refs[1], (unsigned)i);
    if (in.ext->v[1] == 2 && (w.pred(in.ext->refs[1]) >> i) & 1) have = 0;
    if (have > in.bytes) w.fail(in, i, "cp.async: src-size ", have, " exceeds cp-size ", in.bytes);
    op->to[i] = p.offset;
    op->have[i] = have;
    op->from[i] = p.p;
    if (have) {
      w.needValid(in, in.ext->refs[0], 1u << i, "address");
      uint64_t g = lane64(w, in.ext->refs[0], (unsigned)i) + (uint64_t)in.ext->v[0];
      if (g % in.bytes) w.fail(in, i, "misaligned cp.async source");
      op->from[i] = locateGlobal(w, in, i, g, have, Kind::Read, 1).p;
    }
    w.launch->n.globalRead += have;
    w.launch->n.sharedWrite += in.bytes;
    laneAsync(w, in, i, *w.cta, p.offset, in.bytes, Kind::Write);
  }
  launchOp(w, in, m, op, &w.cp);
}
void cpCommit(Warp& w, const Inst&, uint32_t m) { commitGroups(w.cp, m); }
void cpWait(Warp& w, const Inst& in, uint32_t m) { waitGroups(w, w.cp, m, (uint32_t)in.imm, false, in.x[0]); }

struct CpArrive : AsyncOp {
  uint32_t address[kLanes], lanes = 0;
  bool step() override {
    for (int i : lanesOf(lanes)) {
      Mbarrier& b = mbarrierAt(*warp, *inst, i, address[i]);
      arrive(*warp, *inst, i, b, 1);
      raceAsyncSignal(*this, b);
      settle(*warp->launch, b);
    }
    return true;
  }
};
void cpArrive(Warp& w, const Inst& in, uint32_t m) {
  auto op = std::make_shared<CpArrive>();
  op->lanes = m;
  for (int i : lanesOf(m)) {
    op->address[i] = withRank(w, sharedOf(w, in, i, in.space, laneAddress(w, in, i)), false);
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
  int lane = 0, atom = -1;
  Type type = Type::B32;
  bool step() override {
    Place p = locateShared(*warp, *inst, lane, address, bytes, Kind::Write, 1, false);
    raceAsyncShared(*this, *p.cta, p.offset, bytes, Kind::Write);
    if (atom < 0) {
      memcpy(p.p, data, bytes);
    } else {
      uint64_t old = 0, b = 0;
      memcpy(&old, p.p, bytes);
      memcpy(&b, data, bytes);
      uint64_t r = atomicResult(atom, type, old, b, 0);
      memcpy(p.p, &r, bytes);
    }
    memset(p.valid, 1, bytes);
    completeTx(*warp, *inst, lane, barrier, bytes, this);
    return true;
  }
};
// a: destination, ext->refs: {barrier, values...}, v[0] barrier offset, x[0] atomic op + 1, x[3] type
void stAsync(Warp& w, const Inst& in, uint32_t m) {
  const auto& refs = in.ext->refs;
  for (int i : lanesOf(m)) {
    auto op = std::make_shared<StAsync>();
    op->generic = true;
    op->lane = i;
    op->address = (uint32_t)laneAddress(w, in, i);
    op->barrier = (uint32_t)laneBits(w, refs[0], (unsigned)in.ext->v[1], i) + (uint32_t)in.ext->v[0];
    op->bytes = in.bytes * (uint32_t)(refs.size() - 1);
    op->atom = (int)in.x[0] - 1;
    op->type = (Type)in.x[3];
    for (size_t k = 1; k < refs.size(); ++k) {
      w.needValid(in, refs[k], 1u << i, "value of an asynchronous store");
      const uint64_t v = laneBits(w, refs[k], in.bytes, i);
      memcpy(op->data + (k - 1) * in.bytes, &v, in.bytes);
    }
    Cta& target = *locateShared(w, in, i, op->address, op->bytes, Kind::Write, op->bytes, false).cta;
    if ((op->address >> 24) != (op->barrier >> 24))
      w.fail(in, i, "the destination and its mbarrier are in different CTAs");
    raceMbarrierUse(w, in, i, mbarrierAt(w, in, i, op->barrier));
    launchOp(w, in, 1u << i, op, nullptr);
    raceRemote(w, in, i, target, op.get());
  }
}
void decodeAsyncStore(Dec& d, bool reduce) {
  d.take("weak");
  d.take("relaxed");
  d.take("cluster");
  int op = reduce ? takeAtomOp(d) : -1;
  if (!d.take("shared::cluster")) d.fail(".shared::cluster is expected");
  d.take("mbarrier::complete_tx::bytes");
  if (d.has("v2") || d.has("v4")) d.out.vec = (uint8_t)(2u << d.takeOneOf({"v2", "v4"}));
  Type t = d.needType();
  d.wantArgs(3, 3);
  AddressOperand bar = addressOperand(d, d.arg(2));
  d.out.a = d.address(d.arg(0), &d.out.imm);
  Extra* e = d.extra();
  e->refs.push_back(bar.ref);
  e->v[0] = bar.offset;
  e->v[1] = bar.bytes;
  if (d.out.vec > 1)
    for (auto& o : d.arg(1).sub) e->refs.push_back(d.src(o, t));
  else
    e->refs.push_back(d.src(1, t));
  d.out.bytes = (uint8_t)typeBytes(t);
  d.out.x[0] = (uint8_t)(op + 1);
  d.out.x[3] = (uint8_t)t;
  d.out.storesD = true;
  d.out.fn = stAsync;
}

}  // namespace

void decodeStAsync(Dec& d) { decodeAsyncStore(d, false); }
void decodeRedAsync(Dec& d) { decodeAsyncStore(d, true); }

bool decodeBulk(Dec& d);  // cp.async.bulk...

void addAsyncOps(OpTable& t) {
  t["mbarrier"] = decodeMbarrier;
  t["cp"] = [](Dec& d) {
    if (decodeBulk(d)) return;
    d.take("async");
    if (d.take("commit_group")) {
      d.out.fn = cpCommit;
      return;
    }
    if (d.take("wait_all")) {
      d.out.x[0] = 1;
      d.out.fn = cpWait;
      return;
    }
    if (d.take("wait_group")) {
      d.out.imm = d.intArg(0);
      d.out.fn = cpWait;
      return;
    }
    if (d.take("mbarrier")) {
      d.take("arrive");
      d.out.x[0] = d.take("noinc");
      d.out.space = d.take("shared") || d.take("shared::cta") ? Space::Shared : Space::Generic;
      d.take("b64");
      d.out.a = d.address(d.arg(0), &d.out.imm);
      d.out.fn = cpArrive;
      return;
    }
    bool cg = d.takeOneOf({"ca", "cg"}) == 1;
    if (!(d.take("shared") || d.take("shared::cta")) || !d.take("global"))
      d.fail("cp.async copies from .global to .shared");
    bool hint = d.take("L2::cache_hint");
    d.takePrefix("L2::");
    d.out.space = Space::Shared;
    d.wantArgs(3, 5);
    int64_t size = d.intArg(2);
    if (size != 16 && (cg || (size != 4 && size != 8))) d.fail("cp-size must be 16, or 4 or 8 with .ca");
    Extra* e = d.extra();
    AddressOperand g = addressOperand(d, d.arg(1));
    e->refs = {g.ref, Ref{}};
    e->v[0] = g.offset;
    if (d.argc() - hint > 3) {
      const Operand& o = d.arg(3);
      bool neg = false, isPred = o.kind == Operand::Register && d.fn.regs[(size_t)o.reg].type == Type::Pred;
      e->refs[1] = isPred ? d.pred(o, &neg) : d.src(o, Type::U32);
      e->v[1] = isPred ? 2 : 1;
    }
    d.out.a = d.address(d.arg(0), &d.out.imm);
    d.out.bytes = (uint8_t)size;
    d.out.storesD = true;
    d.out.fn = cpAsync;
  };
}

}  // namespace ptxsim
