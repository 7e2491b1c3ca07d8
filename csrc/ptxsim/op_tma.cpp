// Bulk and tensor copies and reductions, and tensor map editing (PTX ISA 9.7.9.25.4 to 9.7.9.27).
#include <algorithm>

#include "async.h"
#include "tensormap.h"

namespace ptxsim {
namespace {

// ---- a copy between global memory and shared memory. Loads finish in one step; stores read their source in a first
// step and write in a second, because the two are waited for apart.

struct Bulk : AsyncOp {
  enum Way { Load, Store, ToCluster } way = Load;
  int lane = 0;
  uint32_t shared = 0, barrier = 0, bytes = 0;  // shared::cluster addresses
  uint16_t ctaMask = 0;                         // multicast; 0: the CTA of `shared`
  uint64_t global = 0;
  int reduce = -1;  // atomic operation
  Type type = Type::None;
  bool tensor = false, told = false;
  TensorMap map;
  int32_t coord[5] = {0, 0, 0, 0, 0};
  std::vector<uint8_t> data, good;  // box contents in logical order; per byte: initialised, and inside the tensor

  void combine(uint8_t* to, const uint8_t* from, uint32_t n) const {
    if (reduce < 0) {
      memcpy(to, from, n);
      return;
    }
    const unsigned e = typeBytes(type);
    for (uint32_t i = 0; i < n; i += e) {
      uint64_t old = 0, b = 0;
      memcpy(&old, to + i, e);
      memcpy(&b, from + i, e);
      uint64_t r = atomicResult(reduce, type, old, b, 0);
      memcpy(to + i, &r, e);
    }
  }
  // Calls f(logical byte offset in the box, global address, bytes) for every run of the innermost dimension inside the
  // tensor.
  template <class F>
  void runs(F f) const {
    const unsigned es = mapElementBytes(map.type);
    uint32_t count[5], total = 1;
    for (unsigned d = 0; d < 5; ++d)
      count[d] = d < map.rank ? (map.box(d) + map.elementStride[d] - 1) / map.elementStride[d] : 1;
    for (unsigned d = 1; d < 5; ++d) total *= count[d];
    const int64_t x0 = coord[0], lo = std::max<int64_t>(x0, 0),
                  hi = std::min<int64_t>(x0 + count[0], (int64_t)map.dim(0));
    if (lo >= hi) return;
    for (uint32_t row = 0; row < total; ++row) {
      uint32_t r = row;
      uint64_t address = map.address + (uint64_t)lo * es;
      bool inside = true;
      for (unsigned d = 1; d < map.rank; ++d) {
        int64_t c = (int64_t)coord[d] + (int64_t)(r % count[d]) * map.elementStride[d];
        r /= count[d];
        inside &= c >= 0 && c < (int64_t)map.dim(d);
        address += (uint64_t)c * map.stride[d - 1];
      }
      if (inside) f((uint64_t)row * count[0] * es + (uint64_t)(lo - x0) * es, address, (uint32_t)((hi - lo) * es));
    }
  }
  uint32_t swizzled(uint32_t offset) const {  // of a byte offset in the CTA's window
    if (!tensor || !map.swizzle) return offset;
    return offset ^ (((offset >> 7) & ((1u << map.swizzle) - 1)) << 4);
  }
  // Moves between the logical box and shared memory, by 16-byte chunks.
  template <class F>
  void chunks(uint32_t base, F f) const {
    for (uint32_t i = 0; i < bytes; i += 16) f(swizzled(base + i), i, std::min(16u, bytes - i));
  }

  Provenance provenance(uint32_t i) const {  // of byte i of the box
    Provenance from;
    from.op = id;
    from.address = map.address;
    uint32_t e = i / mapElementBytes(map.type);
    for (unsigned d = 0; d < map.rank; ++d) {
      const uint32_t count = (map.box(d) + map.elementStride[d] - 1) / map.elementStride[d];
      const int64_t c = coord[d] + (int64_t)(e % count) * map.elementStride[d];
      from.address += (uint64_t)c * (d ? map.stride[d - 1] : mapElementBytes(map.type));
      e /= count;
    }
    return from;
  }

  void readGlobal() {
    data.assign(bytes, 0);
    good.assign(bytes, 1);
    auto take = [&](uint64_t at, uint64_t address, uint32_t n) {
      Place p = locateGlobal(*warp, *inst, lane, address, n, Kind::Read, 1);
      if (!allValid(p.valid, n) && warp->launch->opt.detect)
        warp->fail(*inst, lane, "a bulk copy reads uninitialised global memory");
      raceAsyncGlobal(*this, *p.buffer, (uint64_t)p.p, n, Kind::Read);
      memcpy(data.data() + at, p.p, n);
      warp->launch->n.tmaRead += n;
    };
    if (!tensor) {
      take(0, global, bytes);
      return;
    }
    if (map.fill == 1) {
      const unsigned es = mapElementBytes(map.type);
      const uint64_t nan = map.type == kMapF16    ? 0x7fff
                           : map.type == kMapBf16 ? 0x7fff
                           : map.type == kMapF64  ? 0x7fffffffffffffffull
                                                  : 0x7fffffffull;
      for (uint32_t i = 0; i < bytes; i += es) memcpy(data.data() + i, &nan, es);
    }
    runs(take);
  }
  void readShared() {
    data.assign(bytes, 0);
    good.assign(bytes, 1);
    Place p = locateShared(*warp, *inst, lane, shared, bytes, Kind::Read, 16, false);
    chunks(p.offset, [&](uint32_t off, uint32_t i, uint32_t n) {
      raceAsyncShared(*this, *p.cta, off, n, Kind::Read);
      memcpy(data.data() + i, p.cta->smem + off, n);
      memcpy(good.data() + i, p.cta->smemValid + off, n);
    });
  }
  void writeShared(uint32_t address) {
    Place p = locateShared(*warp, *inst, lane, address, bytes, Kind::Write, 16, false);
    chunks(p.offset, [&](uint32_t off, uint32_t i, uint32_t n) {
      raceAsyncShared(*this, *p.cta, off, n, Kind::Write);
      combine(p.cta->smem + off, data.data() + i, n);
      memcpy(p.cta->smemValid + off, good.data() + i, n);
      if (tensor) raceTag(*p.cta, off, provenance(i));
      for (uint32_t k = 0; k < n; k += 8)
        if (p.cta->mbarIndex[(off + k) >> 3])
          warp->fail(*inst, lane, "a bulk copy overwrites a live mbarrier at shared offset ", off + k);
    });
  }
  void writeGlobal() {
    auto put = [&](uint64_t at, uint64_t address, uint32_t n) {
      Place p = locateGlobal(*warp, *inst, lane, address, n, reduce < 0 ? Kind::Write : Kind::Atomic, 1);
      raceAsyncGlobal(*this, *p.buffer, (uint64_t)p.p, n, reduce < 0 ? Kind::Write : Kind::Atomic);
      if (!allValid(good.data() + at, n) && warp->launch->opt.detect)
        warp->fail(*inst, lane, "a bulk store writes uninitialised shared memory to global memory");
      if (reduce >= 0 && !allValid(p.valid, n))
        warp->fail(*inst, lane, "a bulk reduction adds to uninitialised global memory");
      combine(p.p, data.data() + at, n);
      markValid(p.valid, n, true);
      warp->launch->n.tmaWrite += n;
    };
    if (tensor)
      runs(put);
    else
      put(0, global, bytes);
  }
  bool exitOk() const override { return false; }
  void waited(uint32_t) override {  // for the first time: its source may be written again
    if (!told) laneAsync(*warp, *inst, lane, *warp->cta, shared & 0xffffff, bytes, Kind::Read);
    told = true;
  }
  bool step() override {
    if (way == Store) {
      if (!readDone) {
        readShared();
        readDone = true;
        return false;
      }
      writeGlobal();
      return true;
    }
    if (way == Load)
      readGlobal();
    else
      readShared();
    if (ctaMask) {
      for (uint32_t r = 0; r < 16; ++r)
        if ((ctaMask >> r) & 1) {
          writeShared((shared & 0xffffff) | r << 24);
          completeTx(*warp, *inst, lane, (barrier & 0xffffff) | r << 24, bytes, this);
        }
    } else {
      writeShared(shared);
      completeTx(*warp, *inst, lane, barrier, bytes, this);
    }
    readDone = true;
    return true;
  }
};

// What one instruction needs, decoded once.
struct BulkInst {
  Bulk::Way way;
  bool tensor = false, prefetch = false, generic = false, ctaDst = false;
  unsigned rank = 0;
  int reduce = -1;
  Type type = Type::None;
  AddressOperand shared, global, barrier;  // global: address or tensor map
  Ref size, mask, coord[5];
  bool hasMask = false;
};

TensorMap readMap(Warp& w, const Inst& in, int lane, uint64_t address) {
  if (address % 64) w.fail(in, lane, "a tensor map must lie at a multiple of 64 bytes");
  if (inShared(address) || inLocal(address))
    w.fail(in, lane, "a tensor map must be in parameter, constant or global memory");
  Place p = locateGlobal(w, in, lane, address, 128, Kind::Read, 64);
  raceTensorMap(w, in, *p.buffer, (uint64_t)p.p);
  TensorMap map;
  memcpy(&map, p.p, sizeof map);
  if (map.magic != TensorMap::kMagic || map.rank < 1 || map.rank > 5 || !mapElementBytes(map.type))
    w.fail(in, lane, "there is no tensor map at ", Arena::get().describe(address, 128));
  return map;
}

void bulk(Warp& w, const Inst& in, uint32_t m) {
  const BulkInst& b = *reinterpret_cast<const BulkInst*>(in.imm);
  auto n = [](uint64_t v) { return std::to_string(v); };
  for (int i : lanesOf(m)) {
    const unsigned l = (unsigned)i;
    auto op = std::make_shared<Bulk>();
    op->way = b.way;
    op->lane = i;
    op->reduce = b.reduce;
    op->type = b.type;
    op->tensor = b.tensor;
    w.needValid(in, b.global.ref, 1u << i, "address");
    if (b.tensor) {
      op->map = readMap(w, in, i, b.global.get(w, l));
      if (op->map.rank != b.rank)
        w.fail(in, i, "a ", n(b.rank), "-dimensional copy with a tensor map of rank ", n(op->map.rank));
      op->bytes = mapElementBytes(op->map.type);
      for (unsigned d = 0; d < b.rank; ++d) {
        w.needValid(in, b.coord[d], 1u << i, "tensor coordinate");
        op->coord[d] = (int32_t)lane32(w, b.coord[d], l);
        op->bytes *= (op->map.box(d) + op->map.elementStride[d] - 1) / op->map.elementStride[d];
        if (b.way == Bulk::Store && op->coord[d] < 0)
          w.fail(in, i, "a tensor store at a negative coordinate (dimension ", n(d), ")");
      }
      if (b.reduce >= 0) {
        static const Type kOf[] = {Type::None, Type::None, Type::U32,  Type::S32, Type::U64,  Type::S64, Type::F16,
                                   Type::F32,  Type::F64,  Type::BF16, Type::F32, Type::None, Type::None};
        op->type = kOf[op->map.type];
        if (op->type == Type::None) w.fail(in, i, "the data type of the tensor map has no reduction");
      }
    } else {
      op->global = b.global.get(w, l);
      if (b.way == Bulk::ToCluster) op->global = 0;
      w.needValid(in, b.size, 1u << i, "copy size");
      op->bytes = lane32(w, b.size, l);
      if (op->bytes % 16) w.fail(in, i, "a bulk copy of ", n(op->bytes), " bytes: the size must be a multiple of 16");
      if (b.way != Bulk::ToCluster && op->global % 16)
        w.fail(in, i, "the global address of a bulk copy must be a multiple of 16 bytes");
    }
    if (b.prefetch) {
      if (!b.tensor) locateGlobal(w, in, i, op->global, op->bytes, Kind::Read, 16);
      continue;
    }
    w.needValid(in, b.shared.ref, 1u << i, "address");
    op->shared = (uint32_t)b.shared.get(w, l);
    const bool source = b.way == Bulk::Store;
    if (source || b.ctaDst) {
      if ((op->shared >> 24) != 0 && (op->shared >> 24) != w.cta->rank)
        w.fail(in, i, "a shared::cta operand is in another CTA");
      op->shared = (op->shared & 0xffffff) | w.cta->rank << 24;
    }
    if ((op->shared & 0xffffff) % (b.tensor ? 128 : 16))
      w.fail(in, i, "the shared memory address of the copy, offset ", n(op->shared & 0xffffff),
             ", must be a multiple of ", (b.tensor ? "128" : "16"), " bytes");
    if (op->bytes) {
      const Kind kind = source ? Kind::Read : Kind::Write;
      locateShared(w, in, i, op->shared, op->bytes, kind, 16, false);
      if (op->shared >> 24 == w.cta->rank) laneAsync(w, in, i, *w.cta, op->shared & 0xffffff, op->bytes, kind);
    }
    if (!source) {
      w.needValid(in, b.barrier.ref, 1u << i, "address");
      op->barrier = (uint32_t)b.barrier.get(w, l);
      if (b.ctaDst) op->barrier = (op->barrier & 0xffffff) | w.cta->rank << 24;
      if (b.way == Bulk::ToCluster) {  // `global` holds the source, in the own CTA
        uint32_t from = (uint32_t)b.global.get(w, l);
        if ((op->shared >> 24) == w.cta->rank && w.cta->cluster->ctas.size() > 1)
          w.fail(in, i, "a copy to shared::cluster must go to another CTA");
        struct Two : Bulk {
          uint32_t from = 0;
          bool step() override {
            uint32_t to = shared;
            shared = from;
            readShared();
            readDone = true;
            shared = to;
            writeShared(to);
            completeTx(*warp, *inst, lane, barrier, bytes, this);
            return true;
          }
        };
        auto two = std::make_shared<Two>();
        static_cast<Bulk&>(*two) = *op;
        two->from = (from & 0xffffff) | w.cta->rank << 24;
        laneAsync(w, in, i, *w.cta, two->from & 0xffffff, op->bytes, Kind::Read);
        op = two;
      }
      if (b.hasMask) {
        op->ctaMask = w.ptr<uint16_t>(b.mask)[l];
        if (!op->ctaMask || op->ctaMask >> w.cta->cluster->ctas.size())
          w.fail(in, i, "multicast mask ", n(op->ctaMask), " in a cluster of ", n(w.cta->cluster->ctas.size()));
        for (uint32_t r = 0; r < 16; ++r)
          if ((op->ctaMask >> r) & 1)
            raceMbarrierUse(w, in, i, mbarrierAt(w, in, i, (op->barrier & 0xffffff) | r << 24));
      } else {
        if ((op->barrier >> 24) != (op->shared >> 24))
          w.fail(in, i, "the mbarrier of a bulk copy must be in the CTA of its destination");
        raceMbarrierUse(w, in, i, mbarrierAt(w, in, i, op->barrier));
      }
      launchOp(w, in, 1u << i, op, nullptr);
      for (auto& cta : w.cta->cluster->ctas)
        if (op->ctaMask ? op->ctaMask >> cta->rank & 1 : op->shared >> 24 == cta->rank)
          raceRemote(w, in, i, *cta, op.get());
    } else {
      launchOp(w, in, 1u << i, op, &w.bulk);
    }
  }
}
void bulkCommit(Warp& w, const Inst&, uint32_t m) { commitGroups(w.bulk, m); }
void bulkWait(Warp& w, const Inst& in, uint32_t m) { waitGroups(w, w.bulk, m, (uint32_t)in.imm, in.x[0], false); }

// ---- tensormap.replace: x[0] field, x[1] bytes of the value; a address, b value, v[0] ordinal
const char* kFields[] = {"global_address", "rank",     "box_dim",           "global_dim",   "global_stride",
                         "element_stride", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode"};
void replaceField(Warp& w, const Inst& in, uint32_t m) {
  for (int i : lanesOf(m)) {
    uint64_t a = laneAddress(w, in, i);
    Place p = locate(w, in, i, in.space, a, 128, Kind::Write, 64);
    racePlace(w, in, p, 128, Kind::Write);
    TensorMap t;
    memcpy(&t, p.p, sizeof t);
    w.needValid(in, in.b, 1u << i, "tensor map field");
    const uint64_t v = laneBits(w, in.b, in.x[1], i);
    const unsigned ord = (unsigned)in.ext->v[0];
    auto check = [&](bool ok) {
      if (!ok) w.fail(in, i, "tensormap.replace of ", kFields[in.x[0]], ": ", v, " is not allowed");
    };
    switch (in.x[0]) {
      case 0:
        check(v % 16 == 0);
        t.address = v;
        break;
      case 1:
        check(v < 5);
        t.rank = (uint8_t)(v + 1);
        break;
      case 2:
        check(v >= 1 && v <= 256);
        t.boxLast[ord] = (uint8_t)(v - 1);
        break;
      case 3:
        check(v >= 1);
        t.dimLast[ord] = (uint32_t)(v - 1);
        break;
      case 4:
        check(v % 16 == 0 && v < (1ull << 40));
        t.stride[ord] = v;
        break;
      case 5:
        check(v >= 1 && v <= 8);
        t.elementStride[ord] = (uint8_t)v;
        break;
      case 6: {
        static const uint8_t kTypes[] = {kMapU8,  kMapU16,    kMapU32, kMapS32,  kMapU64,  kMapS64,    kMapF16,
                                         kMapF32, kMapF32Ftz, kMapF64, kMapBf16, kMapTf32, kMapTf32Ftz};
        check(v < sizeof kTypes);
        t.type = kTypes[v];
        break;
      }
      case 7:
        check(v == 0);
        t.interleave = 0;
        break;
      case 8:
        check(v < 4);
        t.swizzle = (uint8_t)v;
        break;
      default:
        check(v < 2);
        t.fill = (uint8_t)v;
        break;
    }
    t.magic = TensorMap::kMagic;
    memcpy(p.p, &t, sizeof t);
    markValid(p.valid, 128, true);
  }
  w.launch->progress();
}
void copyMap(Warp& w, const Inst& in,
             uint32_t m) {  // tensormap.cp_fenceproxy: the warp copies 128 bytes and publishes them
  int i = firstLane(m);
  Place to = locate(w, in, i, Space::Global, laneAddress(w, in, i), 128, Kind::Write, 128);
  Ref src = in.ext->refs[0];
  uint64_t s = laneBits(w, src, (unsigned)in.ext->v[1], i) + (uint64_t)in.ext->v[0];
  Place from = locate(w, in, i, Space::Shared, s, 128, Kind::Read, 128);
  racePlace(w, in, from, 128, Kind::Read);
  racePlace(w, in, to, 128, Kind::Write);
  memcpy(to.p, from.p, 128);
  markValid(to.valid, 128, true);
  w.launch->progress();
}
void decodeTensormap(Dec& d) {
  Extra* e = d.extra();
  if (d.take("cp_fenceproxy")) {
    for (auto m : {"global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"}) d.take(m);
    d.takeOneOf({"cta", "cluster", "gpu", "sys"});
    d.wantArgs(3, 3);
    AddressOperand from = addressOperand(d, d.arg(1));
    e->refs = {from.ref};
    e->v[0] = from.offset;
    e->v[1] = from.bytes;
    d.out.a = d.address(d.arg(0), &d.out.imm);
    d.out.convergeAll = true;
    d.out.fn = copyMap;
    return;
  }
  if (!d.take("replace")) d.fail("unknown operation");
  d.take("tile");
  int field = -1;
  for (int i = 0; i < 10 && field < 0; ++i)
    if (d.take(kFields[i])) field = i;
  if (field < 0) d.fail("unknown field");
  d.out.space = d.take("global")                              ? Space::Global
                : (d.take("shared::cta") || d.take("shared")) ? Space::Shared
                                                              : Space::Generic;
  d.take("b1024");
  Type t = d.needType();
  const bool ordinal = field >= 2 && field <= 5;
  d.wantArgs(ordinal ? 3 : 2, ordinal ? 3 : 2);
  if (ordinal) {
    e->v[0] = d.intArg(1);
    if (e->v[0] < 0 || e->v[0] > (field == 4 ? 3 : 4)) d.fail("the ordinal is out of range");
  }
  d.out.a = d.address(d.arg(0), &d.out.imm);
  d.out.b = d.src(ordinal ? 2 : 1, t);
  d.out.x[0] = (uint8_t)field;
  d.out.x[1] = (uint8_t)typeBytes(t);
  d.out.fn = replaceField;
}

}  // namespace

// cp{.reduce}.async.bulk...; false: another cp
bool decodeBulk(Dec& d) {
  if (!d.has("bulk")) return false;
  auto owned = std::make_unique<BulkInst>();
  BulkInst& b = *owned;
  bool reduce = d.take("reduce");
  d.take("async");
  d.take("bulk");
  if (d.take("commit_group")) {
    d.out.fn = bulkCommit;
    return true;
  }
  if (d.take("wait_group")) {
    d.out.x[0] = d.take("read");
    d.out.imm = d.intArg(0);
    d.out.fn = bulkWait;
    return true;
  }
  b.prefetch = d.take("prefetch");
  b.tensor = d.take("tensor");
  if (b.tensor) {
    b.rank = 1 + (unsigned)d.takeOneOf({"1d", "2d", "3d", "4d", "5d"});
    if (!b.rank) d.fail("a dimension is missing");
    d.take("tile");
  }
  if (b.prefetch) d.take("L2");
  static const char* kSpaces[] = {"shared::cluster", "shared::cta", "global"};
  std::vector<int> spaces;  // destination, then source
  for (size_t k = 1; k < d.p.op.size(); ++k)
    for (int s = 0; s < 3; ++s)
      if (d.p.op[k] == kSpaces[s]) spaces.push_back(s), d.used[k] = true;
  const bool complete = d.take("mbarrier::complete_tx::bytes"), group = d.take("bulk_group");
  bool multicast = d.take("multicast::cluster"), hint = d.take("L2::cache_hint");
  if (b.prefetch) {
    if (spaces != std::vector<int>{2}) d.fail("a prefetch names .global");
    b.way = Bulk::Load;
  } else if (spaces.size() != 2) {
    d.fail("two state spaces are expected");
  } else if (spaces[1] == 2) {
    b.way = Bulk::Load;
    b.ctaDst = spaces[0] == 1;
  } else if (spaces[0] == 2) {
    b.way = Bulk::Store;
  } else {
    b.way = Bulk::ToCluster;
  }
  if (!b.prefetch && (b.way == Bulk::Store ? !group : !complete))
    d.fail("the completion mechanism is missing or wrong");
  if (reduce) {
    b.reduce = takeAtomOp(d);
    if (b.reduce < 0 || b.reduce == 3 || b.reduce == 4) d.fail("an operation is missing");
    d.take("noftz");
    if (!b.tensor) b.type = d.needType();
  }
  auto coords = [&](const Operand& o) {  // [map, {x, y, ...}]
    if (o.kind != Operand::Address || o.sub.size() != 2) d.fail("[tensor map, {coordinates}] is expected");
    std::vector<Operand> list = o.sub[1].kind == Operand::Vector ? o.sub[1].sub : std::vector<Operand>{o.sub[1]};
    if (list.size() != b.rank) d.fail("wrong number of coordinates");
    for (size_t i = 0; i < list.size(); ++i) b.coord[i] = d.src(list[i], Type::S32);
    b.global = addressOperand(d, o);
  };
  size_t used;
  if (b.way == Bulk::Store) {
    if (b.tensor)
      coords(d.arg(0));
    else
      b.global = addressOperand(d, d.arg(0));
    b.shared = addressOperand(d, d.arg(1));
    used = 2;
    if (!b.tensor) b.size = d.src(used++, Type::U32);
  } else if (b.prefetch) {
    if (b.tensor)
      coords(d.arg(0));
    else
      b.global = addressOperand(d, d.arg(0));
    used = 1;
    if (!b.tensor) b.size = d.src(used++, Type::U32);
  } else {
    b.shared = addressOperand(d, d.arg(0));
    if (b.tensor)
      coords(d.arg(1));
    else
      b.global = addressOperand(d, d.arg(1));
    used = 2;
    if (!b.tensor) b.size = d.src(used++, Type::U32);
    b.barrier = addressOperand(d, d.arg(used++));
    if (multicast) {
      b.hasMask = true;
      b.mask = d.src(used++, Type::U16);
    }
  }
  d.wantArgs(used + hint, used + hint);
  d.kb.k.owned.push_back(std::shared_ptr<void>(owned.release(), [](void* p) { delete static_cast<BulkInst*>(p); }));
  d.out.imm = (int64_t)d.kb.k.owned.back().get();
  d.out.fn = bulk;
  return true;
}

void addTmaOps(OpTable& t) { t["tensormap"] = decodeTensormap; }

}  // namespace ptxsim
