#include "host/bindings.h"

#include "mla/launchers.h"

namespace dsv3 {

void bind_mla_decode(py::module_& m);  // decode_bindings.cpp

void bind_mla(py::module_& m) {
  bind_mla_decode(m);
}

}  // namespace dsv3
