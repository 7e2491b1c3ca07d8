#include "host/bindings.h"
#include "mla/decode_launchers.h"

namespace dsv3 {

void bind_mla_decode(py::module_& m) {
  m.def(
      "mla_decode_plan",
      [](uintptr_t lengths, int64_t requests, int64_t parts, int64_t start_cost, bool fixed, uintptr_t work,
         int64_t items, uintptr_t splits, uintptr_t bounds, int device, uintptr_t stream) {
        mla_decode_plan(pointer(lengths), requests, parts, start_cost, fixed, pointer(work), items, pointer(splits),
                        pointer(bounds), {device, stream});
      },
      Unlocked());
}

}  // namespace dsv3
