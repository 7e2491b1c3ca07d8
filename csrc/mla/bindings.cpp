#include "host/bindings.h"

#include "mla/launchers.h"

namespace dsv3 {

void bind_mla(py::module_&) {}

}  // namespace dsv3
