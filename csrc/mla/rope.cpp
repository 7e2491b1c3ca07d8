// Launcher of rope. Arguments were checked in Python; here they become a grid
// and a parameter struct.
#include "mla/launchers.h"
#include "mla/rope_params.h"

namespace dsv3 {

void rope(const MlaRows& x, const void* positions, bool positions_are_int64, const MlaTable& cos_sin,
          const MlaRows& out, bool interleaved, bool transposed, const Target& target) {
  static constexpr const char* kOp = "rope";
  static constexpr const Kernel* kTypes[] = {&kernel("rope_f32"), &kernel("rope_bf16"), &kernel("rope_f16")};
  const int64_t rows = x.outer * x.inner, bytes = element_bytes(x.type);
  if (rows == 0 || x.columns == 0) return;
  if (rows > INT32_MAX) throw Error("rope: x has more rows than a grid covers");

  RopeParams params{};
  params.x = x.data;
  params.out = const_cast<void*>(out.data);
  params.positions = positions;
  params.cos_sin = static_cast<const float*>(cos_sin.data);
  params.x_token_stride = x.outer_stride;
  params.x_head_stride = x.inner_stride;
  params.out_token_stride = out.outer_stride;
  params.out_head_stride = out.inner_stride;
  params.table_stride = cos_sin.row_stride;
  params.table_rows = cos_sin.rows;
  params.rows = static_cast<uint32_t>(rows);
  params.heads = static_cast<uint32_t>(x.inner);
  params.pairs = static_cast<uint32_t>(x.columns / 2);
  params.positions_are_int64 = positions_are_int64;
  params.interleaved = interleaved;
  params.transposed = transposed;
  // Pieces of four pairs: 8 elements interleaved, 4 in either half.
  const int64_t piece = interleaved ? 8 : 4;
  params.vectors = x.columns % 8 == 0 && rows_aligned(x, piece * bytes) && rows_aligned(out, piece * bytes) &&
                   (x.columns * bytes) % (piece * bytes) == 0 && aligned(cos_sin.data, 16) &&
                   (cos_sin.rows <= 1 || cos_sin.row_stride % 4 == 0);

  constexpr int64_t kRows = kRopeThreads / kRopeLanes;
  Driver::of(kOp, target)
      .launch(kOp, *kTypes[static_cast<int>(x.type)], {static_cast<unsigned>((rows + kRows - 1) / kRows), 1, 1}, params,
              target,
              {buffer(x, Access::kRead),
               {positions, static_cast<size_t>(x.outer * (positions_are_int64 ? 8 : 4)), Access::kRead},
               buffer(cos_sin),
               buffer(out, Access::kWrite)});
}

}  // namespace dsv3
