// Tensors of two or three dimensions; a plan for `explain`.
#include "host/bindings.h"

#include <string>

#include "gemm/fp8_select.h"
#include "gemm/launchers.h"

namespace dsv3 {
namespace {

GemmOperand operand(py::handle object) {
  const TensorArgument t = tensor(object);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2]};
}

GemmScale scale(py::handle object) {
  const TensorArgument t = tensor(object);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], t.strides[3]};
}

GemmOutput output(py::handle object, bool accumulate) {
  const TensorArgument t = tensor(object);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], t.element_bytes == 4, accumulate};
}

void gemm(py::handle a, py::handle a_scale, py::handle b, py::handle b_scale, py::handle bias, py::handle out,
          bool accumulate, const char* policy, int num_sms, int device, uintptr_t stream) {
  const GemmOperand a_operand = operand(a), b_operand = operand(b);
  const GemmScale a_scales = scale(a_scale), b_scales = scale(b_scale);
  const TensorArgument bias_of = tensor(bias);
  const GemmOutput output_of = output(out, accumulate);
  const py::gil_scoped_release unlocked;
  fp8_gemm(a_operand, a_scales, b_operand, b_scales, bias_of.data, bias_of.element_bytes == 4, output_of,
           {policy, 0, num_sms}, {device, stream});
}

using Launcher = void (*)(const GemmOperand&, const GemmScale&, const GemmOperand&, const GemmScale&, const void*,
                          const GemmOutput&, const GemmChoice&, const Target&);

// Launchers that take offsets or counts.
template <Launcher launcher>
void grouped(py::handle a, py::handle a_scale, py::handle b, py::handle b_scale, py::handle groups, py::handle out,
             bool accumulate, const char* policy, int64_t expected_m, int num_sms, int device, uintptr_t stream) {
  const GemmOperand a_operand = operand(a), b_operand = operand(b);
  const GemmScale a_scales = scale(a_scale), b_scales = scale(b_scale);
  const void* const groups_of = tensor(groups).data;
  const GemmOutput output_of = output(out, accumulate);
  const py::gil_scoped_release unlocked;
  launcher(a_operand, a_scales, b_operand, b_scales, groups_of, output_of, {policy, expected_m, num_sms},
           {device, stream});
}

void swiglu(py::handle a, py::handle a_scale, py::handle b, py::handle b_scale, py::handle offsets, py::handle weights,
            py::handle q, py::handle q_scale, bool pow2_scale, int num_sms, int device, uintptr_t stream) {
  const GemmOperand a_operand = operand(a), b_operand = operand(b);
  const GemmScale a_scales = scale(a_scale), b_scales = scale(b_scale), weights_of = scale(weights);
  const GemmScale q_scales = scale(q_scale);
  void *const offsets_of = tensor(offsets).data, *const q_of = tensor(q).data;
  const py::gil_scoped_release unlocked;
  fp8_grouped_gemm_swiglu_quantize(a_operand, a_scales, b_operand, b_scales, offsets_of, weights_of, q_of, q_scales,
                                   pow2_scale, num_sms, {device, stream});
}

py::dict words_of_plan(const std::string& op, int64_t groups, int64_t rows, int64_t n, int64_t k, bool by_row,
                       int64_t out_bytes, const char* policy, int64_t expected_m, int num_sms, int device) {
  const int64_t sms = device < 0 ? kSms : Driver::of(op.c_str(), {device, 0}).multiprocessors({device, 0});
  const Fp8Plan found =
      plan_fp8(fp8_op(op), {groups, rows, n, k, by_row, out_bytes}, {policy, expected_m, num_sms}, sms);
  const TileSize of_cta = found.kernel->cta_tile();
  py::dict words;
  words["kernel"] = found.kernel->kernel->name;
  words["tile"] = py::make_tuple(found.kernel->tile.m, found.kernel->tile.n);
  words["pair"] = found.kernel->ctas == 2;
  words["stages"] = fp8_stages(static_cast<uint32_t>(of_cta.m), static_cast<uint32_t>(of_cta.n));
  words["split"] = found.split;
  words["tiles"] = found.tiles;
  words["waves"] = found.waves;
  words["us"] = found.cycles / kClock * 1e6;
  words["bound"] = kBoundNames[static_cast<int>(found.bound)];
  words["measured"] = found.measured;
  return words;
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("fp8_gemm", &gemm);
  m.def("fp8_grouped_gemm", &grouped<&fp8_grouped_gemm>);
  m.def("fp8_masked_gemm", &grouped<&fp8_masked_gemm>);
  m.def("fp8_grouped_wgrad", &grouped<&fp8_grouped_wgrad>);
  m.def("fp8_grouped_gemm_swiglu_quantize", &swiglu);
  m.def("fp8_plan", &words_of_plan,
        "What a launch of these sizes would be (csrc/gemm/fp8_select.h); device -1: an H200's SMs.");
}

}  // namespace dsv3
