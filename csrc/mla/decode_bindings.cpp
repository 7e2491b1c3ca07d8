#include "host/bindings.h"
#include "mla/decode_launchers.h"

namespace dsv3 {
namespace {

DecodeRows decode_rows(const TensorArgument& t) {
  return {t.data, t.sizes[0], t.sizes[1], t.sizes[2], t.strides[0], t.strides[1], t.strides[2]};
}

DecodeCache decode_cache(const TensorArgument& t) {
  return {t.data, t.sizes[1], t.sizes[2], t.strides[1], t.element_bytes == 1};
}

DecodeTable decode_table(const TensorArgument& t) { return {t.data, t.sizes[2], t.sizes[3], t.strides[2]}; }

}  // namespace

void bind_mla_decode(py::module_& m) {
  m.def("mla_decode_plan", [](py::handle lengths, int64_t start_cost, bool fixed, py::handle work, py::handle splits,
                              py::handle bounds, int device, uintptr_t stream) {
    const TensorArgument keys = tensor(lengths), items = tensor(work), parts = tensor(bounds);
    void* const splits_of = tensor(splits).data;
    const py::gil_scoped_release unlocked;
    mla_decode_plan(keys.data, keys.sizes[3], parts.sizes[3] - 1, start_cost, fixed, items.data, items.sizes[2],
                    splits_of, parts.data, {device, stream});
  });
  m.def("mla_decode", [](py::handle q, py::handle kv_cache, py::handle block_table, py::handle lengths, py::handle work,
                         py::handle splits, py::handle bounds, double softmax_scale, bool causal, py::handle out,
                         py::handle lse, py::handle workspace, bool simple, int device, uintptr_t stream) {
    const TensorArgument queries = tensor(q), cache = tensor(kv_cache), table = tensor(block_table),
                         items = tensor(work), parts = tensor(bounds), outputs = tensor(out);
    const void *const lengths_of = tensor(lengths).data, *const splits_of = tensor(splits).data;
    void *const lse_of = tensor(lse).data, *const workspace_of = tensor(workspace).data;
    const py::gil_scoped_release unlocked;
    mla_decode(decode_rows(queries), decode_cache(cache), decode_table(table), lengths_of,
               {items.data, splits_of, parts.data, items.sizes[2], parts.sizes[3] - 1}, softmax_scale, causal,
               decode_rows(outputs), lse_of, workspace_of, simple, {device, stream});
  });
  m.def("mla_decode_cluster",
        [](py::handle q, py::handle kv_cache, py::handle block_table, py::handle lengths, double softmax_scale,
           bool causal, py::handle out, py::handle lse, int64_t cluster, int device, uintptr_t stream) {
          const TensorArgument queries = tensor(q), cache = tensor(kv_cache), table = tensor(block_table),
                               outputs = tensor(out);
          const void* const lengths_of = tensor(lengths).data;
          void* const lse_of = tensor(lse).data;
          const py::gil_scoped_release unlocked;
          mla_decode_cluster(decode_rows(queries), decode_cache(cache), decode_table(table), lengths_of, softmax_scale,
                             causal, decode_rows(outputs), lse_of, cluster, {device, stream});
        });
}

}  // namespace dsv3
