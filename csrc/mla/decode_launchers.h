// Launchers of decode: the plan and the attention. Sizes and strides in elements unless said; the target last.
#pragma once

#include <cstdint>

#include "host/driver.h"

namespace dsv3 {

// `work` has `items` rows, `bounds` parts + 1 elements.
void mla_decode_plan(const void* lengths, int64_t requests, int64_t parts, int64_t start_cost, bool fixed, void* work,
                     int64_t items, void* splits, void* bounds, const Target& target);

}  // namespace dsv3
