// Memory accesses of lanes, checked: which bytes they may touch and where these are on the host.
#pragma once
#include "ops.h"

namespace ptxsim {

enum class Kind : uint8_t { Read, Write, Rewrite, Atomic };  // Rewrite: a write of what is there

struct Place {
  uint8_t* p = nullptr;
  uint8_t* valid = nullptr;  // one byte per byte, 1 = initialised; nullptr: all are
  Cta* cta = nullptr;        // shared memory of this CTA, at `offset`
  uint32_t offset = 0;
  Buffer* buffer = nullptr;  // global memory
};

inline Place placeIn(Cta& c, uint32_t offset) { return {c.smem + offset, c.smemValid + offset, &c, offset}; }

// Checks bounds, alignment (`align` bytes) and permission; throws what a debugger would want to read.
Place locate(Warp& w, const Inst& in, int lane, Space space, uint64_t address, uint32_t bytes, Kind kind,
             uint32_t align);
// At a shared::cluster address; `own`: it must be this CTA's.
Place locateShared(Warp& w, const Inst& in, int lane, uint32_t address, uint32_t bytes, Kind kind, uint32_t align,
                   bool own);
Place locateGlobal(Warp& w, const Inst& in, int lane, uint64_t address, uint32_t bytes, Kind kind, uint32_t align);

// The lanes of `m` access `bytes` each at in.a + in.imm (in.x[5] bytes of the register), aligned to their size.
struct Span {
  uint64_t a[kLanes];
  uint8_t* p[kLanes];
  uint8_t* v[kLanes];
  uint32_t bytes;
  bool tracked = false;  // some v is set
  Span(Warp& w, const Inst& in, uint32_t m, uint32_t size, Kind kind);
  uint8_t* valid(int lane, uint32_t offset) const { return v[lane] ? v[lane] + offset : nullptr; }
  // After a write, which looks for races only now: those lanes altered memory.
  void written(Warp& w, const Inst& in, uint32_t m, uint32_t changed) const;
};

std::string hex(uint64_t v);                              // for reports
inline bool allValid(const uint8_t* v, uint32_t bytes) {  // they are 1 or 0
  uint8_t all = 1;
  for (uint32_t i = 0; v && i < bytes; ++i) all &= v[i];
  return all;
}
inline void markValid(uint8_t* v, uint32_t bytes, bool valid) {
  if (v) memset(v, valid, bytes);
}

}  // namespace ptxsim
