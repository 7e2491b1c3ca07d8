#include "host/bindings.h"

#include "moe/launchers.h"

namespace dsv3 {
namespace {

// Two-dimensional; nullptr for None.
MoeMatrix matrix(py::handle argument) {
  const TensorArgument t = tensor(argument);
  return {t.data, t.sizes[2], t.sizes[3], t.strides[2], t.strides[3], t.element_bytes};
}

}  // namespace

void bind_moe(py::module_& m) {
  m.def("moe_gate", [](py::handle logits, py::handle bias, uintptr_t weights, uintptr_t experts, int64_t num_groups,
                       int64_t topk_groups, int64_t top_k, double scaling, bool normalize, bool softmax, int device,
                       uintptr_t stream) {
    const MoeMatrix scored = matrix(logits), added = matrix(bias);
    const py::gil_scoped_release unlocked;
    moe_gate(scored, added, pointer(weights), pointer(experts), num_groups, topk_groups, top_k, scaling, normalize,
             softmax, {device, stream});
  });
  m.def("moe_gate_backward",
        [](uintptr_t grad_weights, py::handle logits, uintptr_t experts, uintptr_t grad_logits, int64_t top_k,
           double scaling, bool normalize, bool softmax, int device, uintptr_t stream) {
          const MoeMatrix scored = matrix(logits);
          const py::gil_scoped_release unlocked;
          moe_gate_backward(pointer(grad_weights), scored, pointer(experts), pointer(grad_logits), top_k, scaling,
                            normalize, softmax, {device, stream});
        });
  m.def("moe_permute", [](py::handle x, py::handle experts, py::handle scale, int64_t num_experts, int64_t alignment,
                          py::handle rows, py::handle row_scale, uintptr_t offsets, uintptr_t counts, uintptr_t row_of,
                          uintptr_t source, int device, uintptr_t stream) {
    const MoeMatrix from = matrix(x), chosen = matrix(experts), scales = matrix(scale);
    const MoeMatrix to = matrix(rows), row_scales = matrix(row_scale);
    const py::gil_scoped_release unlocked;
    moe_permute(from, chosen, scales, num_experts, alignment, to, row_scales, pointer(offsets), pointer(counts),
                pointer(row_of), pointer(source), {device, stream});
  });
  m.def("moe_unpermute", [](py::handle rows, int type, py::handle row_of, py::handle weights, uintptr_t out, int device,
                            uintptr_t stream) {
    const MoeMatrix from = matrix(rows), places = matrix(row_of), factors = matrix(weights);
    const py::gil_scoped_release unlocked;
    moe_unpermute(from, static_cast<RowType>(type), places, factors, pointer(out), {device, stream});
  });
  m.def("moe_unpermute_backward",
        [](uintptr_t grad, py::handle rows, int type, py::handle row_of, uintptr_t source, py::handle weights,
           py::handle grad_rows, uintptr_t grad_weights, int device, uintptr_t stream) {
          const MoeMatrix from = matrix(rows), places = matrix(row_of), factors = matrix(weights);
          const MoeMatrix to = matrix(grad_rows);
          const py::gil_scoped_release unlocked;
          moe_unpermute_backward(pointer(grad), from, static_cast<RowType>(type), places, pointer(source), factors, to,
                                 pointer(grad_weights), {device, stream});
        });
}

}  // namespace dsv3
