// Launcher of moe_permute: the places of all choices, then the copy of their rows.
#include "moe/moe_launch.h"
#include "moe/moe_permute_params.h"

namespace dsv3 {

void moe_permute(const MoeMatrix& x, const MoeMatrix& experts, const MoeMatrix& scale, int64_t num_experts,
                 int64_t alignment, const MoeMatrix& rows, const MoeMatrix& row_scale, void* offsets, void* counts,
                 void* row_of, void* source, const Target& target) {
  static constexpr const char* kOp = "moe_permute";
  static constexpr const Kernel& kPlace = kernel("moe_permute_place");
  static constexpr const Kernel& kVectors = kernel("moe_permute_copy_vectors");
  static constexpr const Kernel& kBytes = kernel("moe_permute_copy_bytes");
  const int64_t tokens = experts.rows, choices = experts.columns, all = tokens * choices;
  if (num_experts > kPlaceMostExperts) throw Error("moe_permute: more experts than a CTA has threads");
  Driver& driver = Driver::of(kOp, target);

  MoePlaceParams place{};
  place.experts = experts.data;
  place.offsets = static_cast<int32_t*>(offsets);
  place.counts = static_cast<int32_t*>(counts);
  place.row_of = static_cast<int32_t*>(row_of);
  place.source = static_cast<int32_t*>(source);
  place.token_stride = experts.row_stride;
  place.choice_stride = experts.column_stride;
  place.tokens = static_cast<int32_t>(tokens);
  place.choices = static_cast<int32_t>(choices);
  place.num_experts = static_cast<int32_t>(num_experts);
  place.alignment = to_int32(kOp, "alignment", alignment);
  place.rows = to_int32(kOp, "rows", rows.rows);
  place.is_int64 = experts.element_bytes == 8;
  const int64_t ctas = std::max<int64_t>((all + kPlaceThreads - 1) / kPlaceThreads, 1);
  const size_t offset_bytes = static_cast<size_t>(num_experts + 1) * 4, count_bytes = offset_bytes - 4;
  const size_t choice_bytes = static_cast<size_t>(all) * 4;
  driver.launch(kOp, kPlace, {static_cast<unsigned>(ctas), 1, 1}, place, target,
                {{experts.data, span(experts), Access::kRead},
                 {offsets, offset_bytes, Access::kWrite},
                 {counts, count_bytes, Access::kWrite},
                 {row_of, choice_bytes, Access::kWrite},
                 {source, static_cast<size_t>(rows.rows) * 4, Access::kWrite}});

  const bool scaled = scale.data != nullptr && scale.columns > 0;
  if (rows.rows == 0 || (x.columns == 0 && !scaled)) return;
  MoeCopyParams copy{};
  copy.x = static_cast<const uint8_t*>(x.data);
  copy.rows = static_cast<uint8_t*>(rows.data);
  copy.scale = static_cast<const float*>(scale.data);
  copy.row_scale = static_cast<float*>(row_scale.data);
  copy.row_of = place.row_of;
  copy.offsets = place.offsets;
  copy.counts = place.counts;
  copy.row_bytes = x.columns * x.element_bytes;
  copy.x_stride = x.row_stride * x.element_bytes;
  copy.scale_row_stride = scale.row_stride;
  copy.scale_block_stride = scale.column_stride;
  copy.row_scale_row_stride = row_scale.row_stride;
  copy.row_scale_block_stride = row_scale.column_stride;
  copy.choices = place.choices;
  copy.blocks = scaled ? static_cast<int32_t>(scale.columns) : 0;
  copy.padded = alignment > 1 ? place.num_experts : 0;
  const bool vectors = aligned(x.data, 16) && aligned(rows.data, 16) && copy.row_bytes % 16 == 0 &&
                       (tokens <= 1 || copy.x_stride % 16 == 0);
  const int32_t grid = to_int32(kOp, "tokens", copy.padded + tokens);
  if (grid == 0) return;
  driver.launch(kOp, vectors ? kVectors : kBytes, {static_cast<unsigned>(grid), 1, 1}, copy, target,
                {{x.data, span(x), Access::kRead},
                 {rows.data, static_cast<size_t>(rows.rows * copy.row_bytes), Access::kWrite},
                 {scale.data, span(scale), Access::kRead},
                 {row_scale.data, scaled ? span(row_scale) : 0, Access::kWrite},
                 {row_of, choice_bytes, Access::kRead},
                 {offsets, offset_bytes, Access::kRead},
                 {counts, count_bytes, Access::kRead}});
}

}  // namespace dsv3
