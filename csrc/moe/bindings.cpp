#include "host/bindings.h"

#include "moe/launchers.h"

namespace dsv3 {

void bind_moe(py::module_&) {}

}  // namespace dsv3
