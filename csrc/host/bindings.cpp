// The module dsv3_kernels._host: the driver's own functions here, each family's launchers in
// csrc/<family>/bindings.cpp.
#include "host/bindings.h"

#include <algorithm>
#include <string>

namespace dsv3 {
namespace {

py::dict kernels() {
  py::dict table;
  for (const Kernel& kernel : kKernels) {
    py::dict row;
    row["image"] = kernel.image;
    row["threads"] = kernel.threads;
    row["shared_bytes"] = kernel.shared_bytes;
    row["cluster"] = kernel.cluster;
    row["tile"] = kernel.tile;
    row["waits"] = kernel.waits;
    table[kernel.name] = row;
  }
  return table;
}

py::dict launch_counts() {
  py::dict counts;
  for (const Kernel& kernel : kKernels) counts[kernel.name] = launch_count(kernel);
  return counts;
}

// Never throws: what `dsv3 info` prints about a driver.
py::dict driver_info(const std::string& path) {
  py::dict info;
  info["path"] = path;
  info["version"] = py::none();
  info["error"] = "";
  try {
    Driver& driver = Driver::at(path);
    info["version"] = driver.version();
    info["drop_in"] = driver.drop_in();
  } catch (const Error& error) {
    info["error"] = error.what();
  }
  return info;
}

void preload(int device) { Driver::of("preload", {device, 0}).preload(device); }

// `with use_driver(path):` leads this thread's launches to a drop-in driver.
class UseDriver {
 public:
  explicit UseDriver(const std::string& path) : driver_(&Driver::at(path)) {}
  void enter() { before_ = Driver::use(driver_); }
  void exit(const py::args&) { Driver::use(before_); }

 private:
  Driver* driver_;
  Driver* before_ = nullptr;
};

// `with early_launches():` lets this thread's kernels start before their predecessors end.
class EarlyLaunches {
 public:
  void enter() { before_ = Driver::launch_early(true); }
  void exit(const py::args&) { Driver::launch_early(before_); }

 private:
  bool before_ = false;
};

// torch's table, or nullptr: torch before 2.10, or a version of it that this file does not know.
const DlpackExchange* dlpack_of_torch() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule.ptr(), kDlpackExchangeName));
  if (table == nullptr) PyErr_Clear();
  return table != nullptr && table->major == 1 && table->view != nullptr ? table : nullptr;
}

}  // namespace

TensorArgument tensor(py::handle object) {
  static const DlpackExchange* const dlpack = dlpack_of_torch();
  TensorArgument result{nullptr, {1, 1, 1, 1}, {0, 0, 0, 0}};
  if (object.is_none()) return result;
  if (dlpack != nullptr) {
    DlpackTensor found;
    if (dlpack->view(object.ptr(), &found) != 0) throw py::error_already_set();
    result.data = static_cast<char*>(found.data) + found.byte_offset;
    result.element_bytes = found.bits / 8;
    std::copy_n(found.sizes, found.dims, result.sizes + 4 - found.dims);
    std::copy_n(found.strides, found.dims, result.strides + 4 - found.dims);
    return result;
  }
  const py::tuple sizes = object.attr("shape"), strides = object.attr("stride")();
  const size_t dims = sizes.size();
  result.data = pointer(object.attr("data_ptr")().cast<uintptr_t>());
  result.element_bytes = object.attr("element_size")().cast<int64_t>();
  for (size_t i = 0; i < dims; ++i) {
    result.sizes[4 - dims + i] = sizes[i].cast<int64_t>();
    result.strides[4 - dims + i] = strides[i].cast<int64_t>();
  }
  return result;
}

}  // namespace dsv3

PYBIND11_MODULE(_host, m) {
  using namespace dsv3;
  m.doc() = "Launchers of the CUDA kernels, and the driver they go through.";
  m.def("kernels", &kernels, "{name: image, threads, shared_bytes, cluster, tile, waits} of every shipped kernel.");
  m.def("launch_counts", &launch_counts, "{name: launches since the last reset, on any driver}.");
  m.def("reset_launch_counts", &reset_launch_counts);
  m.def("preload", &preload, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
        "Loads every kernel for a CUDA device (-1: the drop-in driver).");
  m.def("driver_info", &driver_info, py::arg("path") = "libcuda.so.1",
        "{path, version (13000 is CUDA 13.0), drop_in, error}: loads the driver if need be; never raises.");
  py::class_<UseDriver>(m, "use_driver", "Context manager: this thread's launches go to the drop-in driver at `path`.")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def("__enter__", &UseDriver::enter)
      .def("__exit__", &UseDriver::exit);
  py::class_<EarlyLaunches>(m, "early_launches", "Context manager: see dsv3_kernels.early_launches.")
      .def(py::init<>())
      .def("__enter__", &EarlyLaunches::enter)
      .def("__exit__", &EarlyLaunches::exit);
  bind_quant(m);
  bind_gemm(m);
  bind_mla(m);
  bind_moe(m);
}
