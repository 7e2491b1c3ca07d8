// One binding function per family, each in csrc/<family>/bindings.cpp. A launcher is bound with the GIL released.
#pragma once

#include <pybind11/pybind11.h>

#include "host/dlpack_abi.h"
#include "host/driver.h"

namespace dsv3 {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

// Addresses come from Tensor.data_ptr().
inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A tensor of up to four dimensions, right-aligned: missing leading ones have size 1 and stride 0.
struct TensorArgument {
  void* data;
  int64_t sizes[4];
  int64_t strides[4];
  int64_t element_bytes = 0;  // known where the argument was a tensor
};

// From (address, *sizes, *strides), `layout` of dsv3_kernels/_arguments.py.
inline TensorArgument tensor(const py::tuple& parts) {
  const size_t dims = (parts.size() - 1) / 2;
  TensorArgument result{pointer(parts[0].cast<uintptr_t>()), {1, 1, 1, 1}, {0, 0, 0, 0}};
  for (size_t i = 0; i < dims; ++i) {
    result.sizes[4 - dims + i] = parts[1 + i].cast<int64_t>();
    result.strides[4 - dims + i] = parts[1 + dims + i].cast<int64_t>();
  }
  return result;
}

// From a tensor; None counts as one without an address. Defined in csrc/host/bindings.cpp.
TensorArgument tensor(py::handle object);

void bind_quant(py::module_& m);
void bind_gemm(py::module_& m);
void bind_mla(py::module_& m);
void bind_moe(py::module_& m);

}  // namespace dsv3
