// Bulk and tensor copies and reductions, and tensor map editing (PTX ISA 9.7.9.25.4 to 9.7.9.27).
#include "async.h"
#include "tensormap.h"

namespace ptxsim {
namespace {

// What one instruction needs, decoded once. Its operands are a destination and a source, one of which may be a tensor.
struct BulkInst {
  enum Way { Load, Store, ToCluster, Prefetch } way = Load;
  bool tensor = false, ctaDst = false;
  unsigned rank = 0;
  int reduce = -1;  // atomic operation
  Type type = Type::None;
  AddressOperand to, from, barrier;
  Ref size, multicast, coord[5];
  bool readsShared() const { return way == Store || way == ToCluster; }
  bool writesShared() const { return way == Load || way == ToCluster; }
};

// A copy between global memory and shared memory, or within the latter. Loads finish in one step; stores read their
// source in a first step and write in a second, because the two are waited for apart.
struct Bulk : AsyncOp {
  const BulkInst& b;
  const int lane;
  uint32_t source = 0, target = 0, barrier = 0, bytes = 0;  // shared::cluster addresses
  uint32_t ranks = 0;                                       // CTAs in which target and barrier lie
  uint64_t global = 0;
  bool told = false;
  TensorMap map{};
  int32_t coord[5] = {0, 0, 0, 0, 0};
  std::vector<uint8_t> data, good;  // box contents in logical order; per byte: initialised, and inside the tensor
  Bulk(const BulkInst& inst, int l) : b(inst), lane(l) {}
  Type type() const { return b.tensor ? kMapTypes[map.type].reduction : b.type; }

  // Where element e of the box lies in global memory, and whether the tensor has that but for the innermost coordinate.
  std::pair<uint64_t, bool> placeOf(uint32_t e) const {
    std::pair<uint64_t, bool> place(map.address, true);
    for (unsigned d = 0; d < map.rank; e /= map.count(d++)) {
      const int64_t c = coord[d] + (int64_t)(e % map.count(d)) * map.elementStride[d];
      if (d) place.second &= c >= 0 && c < (int64_t)map.dim(d);
      place.first += (uint64_t)c * (d ? map.stride[d - 1] : map.elementBytes());
    }
    return place;
  }
  // Calls f(byte of the box, global address, bytes) for every run of the innermost dimension inside the tensor.
  template <class F>
  void runs(F f) const {
    if (!b.tensor) return f(0, global, bytes);
    const unsigned es = map.elementBytes(), n = map.count(0);
    const int64_t x0 = coord[0], lo = std::max<int64_t>(x0, 0), hi = std::min<int64_t>(x0 + n, (int64_t)map.dim(0));
    const uint64_t skip = (uint64_t)(lo - x0) * es;
    for (uint32_t e = 0; lo < hi && e < bytes / es; e += n)
      if (const auto [address, inside] = placeOf(e); inside)
        f((uint64_t)e * es + skip, address + skip, (uint32_t)((hi - lo) * es));
  }
  // Between the box and shared memory, by 16 bytes, which the swizzle places.
  void moveShared(uint32_t address, Kind kind) {
    const Place p = locateShared(*warp, *inst, lane, address, bytes, kind, 16, false);
    for (uint32_t i = 0; i < bytes; i += 16) {
      uint32_t off = p.offset + i;
      off ^= ((off >> 7) & ((1u << map.swizzle) - 1)) << 4;
      const uint32_t n = std::min(16u, bytes - i);
      const Place at = placeIn(*p.cta, off);
      raceAsync(*this, at, n, kind);
      if (kind == Kind::Read) {
        memcpy(data.data() + i, at.p, n);
        memcpy(good.data() + i, at.valid, n);
        continue;
      }
      combine(b.reduce, type(), at.p, data.data() + i, n);
      memcpy(at.valid, good.data() + i, n);
      if (b.tensor && warp->launch->race) raceTag(*p.cta, off) = {placeOf(i / map.elementBytes()).first, id};
      for (uint32_t k = 0; k < n; k += 8)
        if (p.cta->hasMbar[(off + k) >> 3])
          warp->fail(*inst, lane, "a bulk copy overwrites a live mbarrier at shared offset ", off + k);
    }
  }
  void moveGlobal(Kind kind) {
    const bool detect = warp->launch->opt.detect;
    runs([&](uint64_t at, uint64_t address, uint32_t n) {
      Place p = locateGlobal(*warp, *inst, lane, address, n, kind, 1);
      raceAsync(*this, p, n, kind);
      if (kind == Kind::Read) {
        if (detect && !allValid(p.valid, n)) warp->fail(*inst, lane, "a bulk copy reads uninitialised global memory");
        memcpy(data.data() + at, p.p, n);
        warp->launch->n.tmaRead += n;
        return;
      }
      if (detect && !allValid(good.data() + at, n))
        warp->fail(*inst, lane, "a bulk store writes uninitialised shared memory to global memory");
      if (kind == Kind::Atomic && !allValid(p.valid, n))
        warp->fail(*inst, lane, "a bulk reduction adds to uninitialised global memory");
      combine(b.reduce, type(), p.p, data.data() + at, n);
      markValid(p.valid, n, true);
      warp->launch->n.tmaWrite += n;
    });
  }
  void waited(uint32_t) override {  // for the first time: its source may be written again
    if (!told) laneAsync(*warp, *inst, lane, placeIn(*warp->cta, source & 0xffffff), bytes, Kind::Read);
    told = true;
  }
  bool step() override {
    if (!readDone) {
      data.assign(bytes, 0);
      good.assign(bytes, 1);
      if (map.fill) {
        const unsigned es = map.elementBytes();
        const uint64_t nan = ~0ull >> (65 - 8 * es);
        for (uint32_t i = 0; i < bytes; i += es) memcpy(data.data() + i, &nan, es);
      }
      b.readsShared() ? moveShared(source, Kind::Read) : moveGlobal(Kind::Read);
      readDone = true;
      if (b.way == BulkInst::Store) return false;
    }
    if (b.way == BulkInst::Store) moveGlobal(b.reduce < 0 ? Kind::Write : Kind::Atomic);
    for (uint32_t r : lanesOf(ranks)) {
      moveShared(inCta(target, r), Kind::Write);
      completeOn(*this, lane, inCta(barrier, r), bytes);
    }
    return true;
  }
};

TensorMap readMap(Warp& w, const Inst& in, int lane, uint64_t address) {
  if (address % 64) w.fail(in, lane, "a tensor map must lie at a multiple of 64 bytes");
  if (inShared(address) || inLocal(address))
    w.fail(in, lane, "a tensor map must be in parameter, constant or global memory");
  Place p = locateGlobal(w, in, lane, address, 128, Kind::Read, 64);
  raceTensorMap(w, in, p);
  TensorMap map;
  memcpy(&map, p.p, sizeof map);
  if (map.magic != TensorMap::kMagic || map.rank < 1 || map.rank > 5 || !map.elementBytes())
    w.fail(in, lane, "there is no tensor map at ", Arena::get().describe(address, 128));
  for (unsigned d = 0; d < map.rank; ++d)
    if (!map.elementStride[d]) w.fail(in, lane, "the tensor map's element stride of dimension ", d, " was never set");
  return map;
}

void bulk(Warp& w, const Inst& in, uint32_t m) {
  const auto& b = owned<BulkInst>(in);
  const auto& ctas = w.cta->cluster->ctas;
  for (int i : lanesOf(m)) {
    auto op = std::make_shared<Bulk>(b, i);
    auto address = [&](const AddressOperand& a) { return laneAddress(w, in, a, i); };
    const AddressOperand& global = b.way == BulkInst::Store ? b.to : b.from;
    if (b.tensor) {
      const TensorMap& map = op->map = readMap(w, in, i, address(global));
      if (map.rank != b.rank)
        w.fail(in, i, "a ", b.rank, "-dimensional copy with a tensor map of rank ", (unsigned)map.rank);
      op->bytes = map.elementBytes();
      for (unsigned d = 0; d < b.rank; ++d) {
        op->coord[d] = (int32_t)lane32(w, in, b.coord[d], i, "tensor coordinate");
        op->bytes *= map.count(d);
        if (b.way == BulkInst::Store && op->coord[d] < 0)
          w.fail(in, i, "a tensor store at a negative coordinate (dimension ", d, ")");
      }
      if (b.reduce >= 0 && op->type() == Type::None) w.fail(in, i, "the data type of the tensor map has no reduction");
    } else {
      op->bytes = lane32(w, in, b.size, i, "copy size");
      if (op->bytes % 16) w.fail(in, i, "a bulk copy of ", op->bytes, " bytes: the size must be a multiple of 16");
      if (b.way != BulkInst::ToCluster) op->global = address(global);
      if (op->global % 16) w.fail(in, i, "the global address of a bulk copy must be a multiple of 16 bytes");
    }
    if (b.way == BulkInst::Prefetch) {
      if (!b.tensor) locateGlobal(w, in, i, op->global, op->bytes, Kind::Read, 16);
      continue;
    }
    auto sharedAddress = [&](const AddressOperand& operand, bool own, Kind kind) {
      uint32_t a = (uint32_t)address(operand);
      if (own && a >> 24 != 0 && a >> 24 != w.cta->rank) w.fail(in, i, "a shared::cta operand is in another CTA");
      if (own) a = inCta(a, w.cta->rank);
      if ((a & 0xffffff) % (b.tensor ? 128 : 16))
        w.fail(in, i, "the shared memory address of the copy, offset ", a & 0xffffff, ", must be a multiple of ",
               b.tensor ? 128 : 16, " bytes");
      if (op->bytes) {
        const Place p = locateShared(w, in, i, a, op->bytes, kind, 16, false);
        if (p.cta == w.cta) laneAsync(w, in, i, p, op->bytes, kind);
      }
      return a;
    };
    if (b.readsShared()) op->source = sharedAddress(b.from, true, Kind::Read);
    if (b.writesShared()) {
      op->target = sharedAddress(b.to, b.ctaDst, Kind::Write);
      op->barrier = (uint32_t)address(b.barrier);
      if (b.ctaDst) op->barrier = inCta(op->barrier, w.cta->rank);
      if (b.way == BulkInst::ToCluster && op->target >> 24 == w.cta->rank && ctas.size() > 1)
        w.fail(in, i, "a copy to shared::cluster must go to another CTA");
      op->ranks = b.multicast ? w.ptr<uint16_t>(b.multicast)[i] : 1u << (op->target >> 24 & 31);
      if (b.multicast && (!op->ranks || op->ranks >> ctas.size()))
        w.fail(in, i, "multicast mask ", op->ranks, " in a cluster of ", ctas.size());
      if (!b.multicast && op->barrier >> 24 != op->target >> 24)
        w.fail(in, i, "the mbarrier of a bulk copy must be in the CTA of its destination");
    }
    for (uint32_t r : lanesOf(op->ranks)) raceMbarrierUse(w, in, i, mbarrierAt(w, in, i, inCta(op->barrier, r)));
    launchOp(w, in, 1u << i, op, b.way == BulkInst::Store ? &w.bulk : nullptr);
    for (uint32_t r : lanesOf(op->ranks)) raceRemote(w, in, i, *ctas[r], op.get());
  }
}

// ---- tensor map editing

struct MapField {
  const char* name;
  int ordinals;
  uint64_t least, most, multiple;
  void (*set)(TensorMap& t, unsigned ordinal, uint64_t v);
};
// The element types of tensormap.replace as the driver numbers them.
const uint8_t kElementTypes[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};
const MapField kFields[] = {
    {"global_address", 0, 0, ~0ull, 16, [](TensorMap& t, unsigned, uint64_t v) { t.address = v; }},
    {"rank", 0, 0, 4, 1, [](TensorMap& t, unsigned, uint64_t v) { t.rank = (uint8_t)(v + 1); }},
    {"box_dim", 5, 1, 256, 1, [](TensorMap& t, unsigned d, uint64_t v) { t.boxLast[d] = (uint8_t)(v - 1); }},
    {"global_dim", 5, 1, ~0ull, 1, [](TensorMap& t, unsigned d, uint64_t v) { t.dimLast[d] = (uint32_t)(v - 1); }},
    {"global_stride", 4, 0, (1ull << 40) - 1, 16, [](TensorMap& t, unsigned d, uint64_t v) { t.stride[d] = v; }},
    {"element_stride", 5, 1, 8, 1, [](TensorMap& t, unsigned d, uint64_t v) { t.elementStride[d] = (uint8_t)v; }},
    {"elemtype", 0, 0, 12, 1, [](TensorMap& t, unsigned, uint64_t v) { t.type = kElementTypes[v]; }},
    {"interleave_layout", 0, 0, 0, 1, [](TensorMap&, unsigned, uint64_t) {}},
    {"swizzle_mode", 0, 0, 3, 1, [](TensorMap& t, unsigned, uint64_t v) { t.swizzle = (uint8_t)v; }},
    {"fill_mode", 0, 0, 1, 1, [](TensorMap& t, unsigned, uint64_t v) { t.fill = (uint8_t)v; }},
};
// x[0] field; a address, b value, v[0] ordinal
void replaceField(Warp& w, const Inst& in, uint32_t m) {
  const MapField& field = kFields[in.x[0]];
  for (int i : lanesOf(m)) {
    Place p = locate(w, in, i, in.space, laneAddress(w, in, i), 128, Kind::Write, 64);
    racePlace(w, in, p, 128, Kind::Write);
    TensorMap t;
    memcpy(&t, p.p, sizeof t);
    w.needValid(in, in.b, 1u << i, "tensor map field");
    const uint64_t v = laneBits(w, in.b, in.bytes, i);
    if (v < field.least || v > field.most || v % field.multiple)
      w.fail(in, i, "tensormap.replace of ", field.name, ": ", v, " is not allowed");
    field.set(t, (unsigned)in.ext->v[0], v);
    t.magic = TensorMap::kMagic;
    memcpy(p.p, &t, sizeof t);
    markValid(p.valid, 128, true);
  }
  w.launch->progress();
}
void decodeReplace(Dec& d) {
  const auto* field = std::find_if(kFields, std::end(kFields), [&](auto& f) { return d.take(f.name); });
  if (field == std::end(kFields)) d.fail("unknown field");
  const int ordinals = field->ordinals;
  d.wantArgs(ordinals ? 3 : 2);
  const int64_t ordinal = d.extra()->v[0] = ordinals ? d.intArg(1) : 0;
  if (ordinals && (ordinal < 0 || ordinal >= ordinals)) d.fail("the ordinal is out of range");
  d.operands("[a]");
  d.out.b = d.src(ordinals ? 2 : 1, d.out.type);
  d.out.x[0] = (uint8_t)(field - kFields);
  d.out.fn = replaceField;
}

// The warp copies 128 bytes and publishes them. a: destination, second address: source
void copyMap(Warp& w, const Inst& in, uint32_t m) {
  const int i = firstLane(m);
  Place to = locate(w, in, i, Space::Global, laneAddress(w, in, i), 128, Kind::Write, 128);
  Place from = locate(w, in, i, Space::Shared, laneAddress(w, in, in.ext->second, i), 128, Kind::Read, 128);
  racePlace(w, in, from, 128, Kind::Read);
  racePlace(w, in, to, 128, Kind::Write);
  memcpy(to.p, from.p, 128);
  markValid(to.valid, 128, true);
  w.launch->progress();
}

template <BulkInst::Way kWay>
void decodeBulk(Dec& d) {
  auto& b = own<BulkInst>(d);
  b.way = kWay;
  b.ctaDst = d.out.x[0];
  b.tensor = d.take("tensor");
  if (b.tensor) b.rank = 1 + (unsigned)d.takeOneOf("1d|2d|3d|4d|5d");
  if (b.tensor && !b.rank) d.fail("a dimension is missing");
  if (b.tensor) d.take("tile");
  const bool hint = d.take("L2::cache_hint");
  if (d.take("reduce")) {
    b.reduce = d.takeOneOf(ATOMIC_OPERATION);
    if (b.reduce < 0 || b.reduce >= 8) d.fail("an operation is missing");
    d.take("noftz");
    if (!b.tensor) b.type = d.needType();
  }
  size_t at = 0;
  auto operand = [&](bool global) {
    const Operand& o = d.arg(at++);
    if (global && b.tensor) {  // [map, {x, y, ...}]
      if (o.kind != Operand::Address || o.sub.size() != 2) d.fail("[tensor map, {coordinates}] is expected");
      Ref* coord = b.coord;
      for (auto& x : d.elements(o.sub[1], b.rank)) *coord++ = d.src(x, Type::S32);
    }
    return d.address(o);
  };
  if (kWay != BulkInst::Prefetch) b.to = operand(kWay == BulkInst::Store);
  b.from = operand(!b.readsShared());
  if (!b.tensor) b.size = d.src(at++, Type::U32);
  if (b.writesShared()) b.barrier = operand(false);
  if (d.out.x[1]) b.multicast = d.src(at++, Type::U16);
  d.wantArgs(at + hint);
  d.out.fn = bulk;
}

const Forms kForms = {
    {"cp", "async bulk commit_group", "", commitGroup<&Warp::bulk>},
    {"cp", "async bulk wait_group read?", "imm", waitGroup<&Warp::bulk>},
    {"cp", "async bulk shared::cluster|shared::cta global mbarrier::complete_tx::bytes multicast::cluster?", nullptr,
     decodeBulk<BulkInst::Load>},
    {"cp", "async bulk global shared::cta bulk_group", nullptr, decodeBulk<BulkInst::Store>},
    {"cp", "async bulk shared::cluster shared::cta mbarrier::complete_tx::bytes", nullptr,
     decodeBulk<BulkInst::ToCluster>},
    {"cp", "async bulk prefetch L2 global", nullptr, decodeBulk<BulkInst::Prefetch>},
    {"tensormap",
     "cp_fenceproxy (global) (shared::cta) (tensormap::generic) (release) (cta|cluster|gpu|sys) sync aligned",
     "[a] [e] c:u32", copyMap},
    {"tensormap", "replace (tile) space (b1024) type", nullptr, decodeReplace},
};

}  // namespace
}  // namespace ptxsim
