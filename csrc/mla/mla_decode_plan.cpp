// Launcher of mla_decode_plan.
#include "mla/decode_launchers.h"
#include "mla/mla_decode_plan_params.h"

namespace dsv3 {

void mla_decode_plan(const void* lengths, int64_t requests, int64_t parts, int64_t start_cost, bool fixed, void* work,
                     int64_t items, void* splits, void* bounds, const Target& target) {
  static constexpr const char* kOp = "mla_decode_plan";
  static constexpr const Kernel& kRow = kernel(kOp);
  MlaDecodePlanParams params{};
  params.lengths = static_cast<const int32_t*>(lengths);
  params.work = static_cast<int32_t*>(work);
  params.splits = static_cast<int32_t*>(splits);
  params.bounds = static_cast<int32_t*>(bounds);
  params.requests = static_cast<int32_t>(requests);
  params.items = static_cast<int32_t>(items);
  params.parts = static_cast<int32_t>(parts);
  params.start_cost = static_cast<int32_t>(start_cost);
  params.fixed = fixed;
  const auto bytes = [](int64_t words) { return static_cast<size_t>(words) * 4; };
  Driver::of(kOp, target)
      .launch(kOp, kRow, {1, 1, 1}, params, target,
              {{lengths, bytes(requests), Access::kRead},
               {work, bytes(4 * items), Access::kWrite},
               {splits, bytes(requests + 1), Access::kWrite},
               {bounds, bytes(parts + 1), Access::kWrite}});
}

}  // namespace dsv3
