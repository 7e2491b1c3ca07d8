// One binding function per family, each in csrc/<family>/bindings.cpp. A launcher is bound with the GIL released.
#pragma once

#include <pybind11/pybind11.h>

#include "host/driver.h"

namespace dsv3 {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

// Addresses come from Tensor.data_ptr().
inline void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

void bind_quant(py::module_& m);
void bind_gemm(py::module_& m);

}  // namespace dsv3
