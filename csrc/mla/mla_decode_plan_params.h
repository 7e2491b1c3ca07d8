// Parameters of mla_decode_plan, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

// The constants of dsv3_kernels/mla/mla_decode_plan.py.
inline constexpr int kPlanKeyBlock = 64;
inline constexpr int kPlanFixedKeys = 512;
inline constexpr int kPlanFixedSplits = 16;
inline constexpr uint32_t kPlanThreads = 256;

struct MlaDecodePlanParams {
  const int32_t* lengths;  // [requests]
  int32_t* work;           // [items, 4]: request, first key, last key, split; -1 where unused
  int32_t* splits;         // [requests + 1]
  int32_t* bounds;         // [parts + 1]
  int32_t requests, items, parts;
  int32_t start_cost;  // of a request, in blocks of keys
  uint32_t fixed;
};

}  // namespace dsv3
