// A tensor comes as (address, *sizes, *strides).
#include "host/bindings.h"

#include "mla/launchers.h"

namespace dsv3 {
namespace {

MlaRows rows(const py::tuple& parts, int type) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], static_cast<RowType>(type)};
}

// [tokens, heads, columns] of bfloat16, from a tensor itself.
MlaRows head_rows(py::handle object) {
  const TensorArgument t = tensor(object);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3], t.strides[1], t.strides[2], RowType::kBFloat16};
}

// A log-sum-exp: what rows has, without columns.
MlaRows lse_rows(const py::tuple& parts) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[2], t.sizes[3], 1, t.strides[2], t.strides[3], RowType::kFloat32};
}

MlaTable table(const py::tuple& parts) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[2], t.sizes[3], t.strides[2]};
}

MlaCache cache(const py::tuple& parts, int64_t element_bytes) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[1], t.sizes[2], t.sizes[3] * element_bytes, t.strides[1] * element_bytes};
}

MlaBytes bytes(const py::tuple& parts, int64_t element_bytes) {
  const TensorArgument t = tensor(parts);
  return {t.data, t.sizes[2], t.sizes[3] * element_bytes, t.strides[2] * element_bytes};
}

PrefillInputs prefill(const py::tuple& q, const py::tuple& k_nope, const py::tuple& k_rope, const py::tuple& v,
                      uintptr_t cu_q, uintptr_t cu_k, int64_t sequences, float scale, bool causal) {
  constexpr int kType = static_cast<int>(RowType::kBFloat16);
  return {rows(q, kType), rows(k_nope, kType), rows(k_rope, kType), rows(v, kType),
          pointer(cu_q),  pointer(cu_k),       sequences,           scale,
          causal};
}

}  // namespace

void bind_mla_decode(py::module_& m);  // decode_bindings.cpp

void bind_mla(py::module_& m) {
  bind_mla_decode(m);
  m.def(
      "rope", [](const py::tuple& x, int type, uintptr_t positions, bool positions_are_int64, const py::tuple& cos_sin,
                 const py::tuple& out, bool interleaved, bool transposed, int device, uintptr_t stream) {
        const MlaRows input = rows(x, type), output = rows(out, type);
        const MlaTable angles = table(cos_sin);
        const py::gil_scoped_release unlocked;
        rope(input, pointer(positions), positions_are_int64, angles, output, interleaved, transposed, {device, stream});
      });
  m.def("mla_cache_append", [](const py::tuple& kv_cache, uintptr_t slots, const py::tuple& latent,
                               const py::tuple& k_rope, bool fp8, int type, int64_t element_bytes, bool pow2_scale,
                               int device, uintptr_t stream) {
    const MlaCache to = cache(kv_cache, fp8 ? 1 : element_bytes);
    const MlaBytes latents = bytes(latent, element_bytes), ropes = bytes(k_rope, element_bytes);
    const py::gil_scoped_release unlocked;
    mla_cache_append(to, pointer(slots), latents, ropes, fp8, static_cast<RowType>(type), pow2_scale, {device, stream});
  });
  m.def("mla_cache_gather",
        [](const py::tuple& kv_cache, const py::tuple& block_table, uintptr_t cu_seqlens, const py::tuple& latent,
           const py::tuple& k_rope, bool fp8, int64_t element_bytes, int device, uintptr_t stream) {
          const MlaCache from = cache(kv_cache, fp8 ? 1 : element_bytes);
          const MlaTable pages = table(block_table);
          const MlaBytes latents = bytes(latent, element_bytes), ropes = bytes(k_rope, element_bytes);
          const py::gil_scoped_release unlocked;
          mla_cache_gather(from, pages, pointer(cu_seqlens), latents, ropes, fp8, {device, stream});
        });
  m.def("merge_attention",
        [](const py::tuple& out_a, const py::tuple& lse_a, const py::tuple& out_b, const py::tuple& lse_b, int type,
           uintptr_t out, uintptr_t lse, int device, uintptr_t stream) {
          const MlaRows a = rows(out_a, type), a_lse = lse_rows(lse_a), b = rows(out_b, type), b_lse = lse_rows(lse_b);
          const py::gil_scoped_release unlocked;
          merge_attention(a, a_lse, b, b_lse, pointer(out), pointer(lse), {device, stream});
        });
  m.def("mla_prefill", [](const py::tuple& q, const py::tuple& k_nope, const py::tuple& k_rope, const py::tuple& v,
                          uintptr_t cu_q, uintptr_t cu_k, int64_t sequences, float scale, bool causal, uintptr_t out,
                          uintptr_t lse, int num_sms, int device, uintptr_t stream) {
    const PrefillInputs inputs = prefill(q, k_nope, k_rope, v, cu_q, cu_k, sequences, scale, causal);
    const py::gil_scoped_release unlocked;
    mla_prefill(inputs, pointer(out), pointer(lse), num_sms, {device, stream});
  });
  m.def("mla_prefill_backward",
        [](const py::tuple& grad_out, const py::tuple& q, const py::tuple& k_nope, const py::tuple& k_rope,
           const py::tuple& v, uintptr_t out, uintptr_t lse, uintptr_t cu_q, uintptr_t cu_k, int64_t sequences,
           float scale, bool causal, uintptr_t delta, uintptr_t rope_parts, int64_t head_groups, uintptr_t grad_q,
           uintptr_t grad_k_nope, uintptr_t grad_k_rope, uintptr_t grad_v, int num_sms, int device, uintptr_t stream) {
          const PrefillInputs inputs = prefill(q, k_nope, k_rope, v, cu_q, cu_k, sequences, scale, causal);
          const PrefillGradients gradients{rows(grad_out, static_cast<int>(RowType::kBFloat16)),
                                           pointer(out),
                                           pointer(lse),
                                           pointer(delta),
                                           pointer(rope_parts),
                                           head_groups,
                                           pointer(grad_q),
                                           pointer(grad_k_nope),
                                           pointer(grad_k_rope),
                                           pointer(grad_v)};
          const py::gil_scoped_release unlocked;
          mla_prefill_backward(inputs, gradients, num_sms, {device, stream});
        });
  m.def("mla_prologue",
        [](const py::tuple& x, uintptr_t q_weight, int q_weight_type, uintptr_t kv_weight, int kv_weight_type,
           uintptr_t positions, bool positions_are_int64, const py::tuple& cos_sin, uintptr_t slots, int64_t rank,
           double eps, const py::tuple& kv_cache, bool fp8, uintptr_t q, const py::tuple& scale, uintptr_t latent,
           uintptr_t k_rope, bool pow2_scale, bool cache_pow2_scale, int device, uintptr_t stream) {
          const PrologueInputs inputs{bytes(x, 2),
                                      pointer(q_weight),
                                      static_cast<RowType>(q_weight_type),
                                      pointer(kv_weight),
                                      static_cast<RowType>(kv_weight_type),
                                      pointer(positions),
                                      positions_are_int64,
                                      table(cos_sin),
                                      pointer(slots),
                                      rank,
                                      eps};
          const TensorArgument scales = tensor(scale);
          const PrologueOutputs outputs{cache(kv_cache, fp8 ? 1 : 2),
                                        pointer(q),
                                        scales.data,
                                        scales.strides[2],
                                        scales.strides[3],
                                        pointer(latent),
                                        pointer(k_rope),
                                        pow2_scale,
                                        cache_pow2_scale};
          const py::gil_scoped_release unlocked;
          mla_prologue(inputs, outputs, {device, stream});
        });
  m.def("mla_absorb", [](py::handle x, py::handle weight, py::handle out, int device, uintptr_t stream) {
    const MlaRows input = head_rows(x), output = head_rows(out);
    const TensorArgument w = tensor(weight);
    const py::gil_scoped_release unlocked;
    mla_absorb(input, {w.data, w.strides[1], w.strides[2], w.strides[3]}, output, {device, stream});
  });
}

}  // namespace dsv3
