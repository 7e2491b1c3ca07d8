// Launcher of merge_attention. Arguments were checked in Python; here they
// become a grid and a parameter struct.
#include "mla/launchers.h"
#include "mla/merge_attention_params.h"

namespace dsv3 {

void merge_attention(const MlaRows& out_a, const MlaRows& lse_a, const MlaRows& out_b, const MlaRows& lse_b, void* out,
                     void* lse, const Target& target) {
  static constexpr const char* kOp = "merge_attention";
  static constexpr const Kernel* kTypes[] = {&kernel("merge_attention_f32"), &kernel("merge_attention_bf16"),
                                             &kernel("merge_attention_f16")};
  const int64_t rows = out_a.outer * out_a.inner, bytes = element_bytes(out_a.type);
  if (rows == 0) return;
  if (rows > INT32_MAX || out_a.columns > INT32_MAX) throw Error("merge_attention: got more rows than a grid covers");

  const auto part = [](const MlaRows& out, const MlaRows& lse) {
    return MergeAttentionPart{out.data,         static_cast<const float*>(lse.data),
                              out.outer_stride, out.inner_stride,
                              lse.outer_stride, lse.inner_stride};
  };
  MergeAttentionParams params{};
  params.parts[0] = part(out_a, lse_a);
  params.parts[1] = part(out_b, lse_b);
  params.out = out;
  params.lse = static_cast<float*>(lse);
  params.rows = static_cast<uint32_t>(rows);
  params.inner = static_cast<uint32_t>(out_a.inner);
  params.columns = static_cast<uint32_t>(out_a.columns);
  params.vectors =
      out_a.columns * bytes % 16 == 0 && rows_aligned(out_a, 16) && rows_aligned(out_b, 16) && aligned(out, 16);

  Driver::of(kOp, target)
      .launch(kOp, *kTypes[static_cast<int>(out_a.type)],
              {static_cast<unsigned>((rows + kMergeRows - 1) / kMergeRows), 1, 1}, params, target,
              {buffer(out_a, Access::kRead),
               buffer(lse_a, Access::kRead),
               buffer(out_b, Access::kRead),
               buffer(lse_b, Access::kRead),
               {out, static_cast<size_t>(rows * out_a.columns * bytes), Access::kWrite},
               {lse, static_cast<size_t>(rows * 4), Access::kWrite}});
}

}  // namespace dsv3
