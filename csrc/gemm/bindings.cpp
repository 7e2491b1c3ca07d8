// A tensor comes as (address, *sizes, *strides), two- or three-dimensional.
#include "host/bindings.h"

#include "gemm/launchers.h"

namespace dsv3 {
namespace {

GemmOperand operand(const py::tuple& parts) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2]};
}

GemmScale scale(const py::tuple& parts) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], t.strides[3]};
}

GemmOutput output(const py::tuple& parts, bool is_float32, bool accumulate) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], is_float32, accumulate};
}

using Launcher = void (*)(const GemmOperand&, const GemmScale&, const GemmOperand&, const GemmScale&, const void*,
                          const GemmOutput&, int, const Target&);

// Launchers that take offsets or counts.
template <Launcher launcher>
void grouped(const py::tuple& a, const py::tuple& a_scale, const py::tuple& b, const py::tuple& b_scale,
             uintptr_t groups, const py::tuple& out, bool is_float32, bool accumulate, int num_sms, int device,
             uintptr_t stream) {
  const GemmOperand a_operand = operand(a), b_operand = operand(b);
  const GemmScale a_scales = scale(a_scale), b_scales = scale(b_scale);
  const GemmOutput output_of = output(out, is_float32, accumulate);
  const py::gil_scoped_release unlocked;
  launcher(a_operand, a_scales, b_operand, b_scales, pointer(groups), output_of, num_sms, {device, stream});
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("fp8_gemm", [](const py::tuple& a, const py::tuple& a_scale, const py::tuple& b, const py::tuple& b_scale,
                       uintptr_t bias, bool bias_is_float32, const py::tuple& out, bool is_float32, bool accumulate,
                       bool fixed, int num_sms, int device, uintptr_t stream) {
    const GemmOperand a_operand = operand(a), b_operand = operand(b);
    const GemmScale a_scales = scale(a_scale), b_scales = scale(b_scale);
    const GemmOutput output_of = output(out, is_float32, accumulate);
    const py::gil_scoped_release unlocked;
    fp8_gemm(a_operand, a_scales, b_operand, b_scales, pointer(bias), bias_is_float32, output_of, fixed, num_sms,
             {device, stream});
  });
  m.def("fp8_grouped_gemm", &grouped<&fp8_grouped_gemm>);
  m.def("fp8_masked_gemm", &grouped<&fp8_masked_gemm>);
  m.def("fp8_grouped_wgrad", &grouped<&fp8_grouped_wgrad>);
}

}  // namespace dsv3
