// What the launchers of rms_norm and rms_norm_quantize_1x128 share.
#pragma once

#include "quant/launchers.h"
#include "quant/rms_norm_params.h"
#include "quant/vectors.h"

namespace dsv3 {

// `warp` takes aligned rows of up to 2048 columns, `row` all others.
inline void launch_norm(const char* op, const Kernel& warp, const Kernel& row, const NormArguments& a,
                        const Target& target) {
  if (a.rows == 0 || a.columns == 0) return;
  if (a.columns > kNormColumnsByCta) throw Error(std::string(op) + ": x has longer rows than a CTA keeps");

  RmsNormParams params{};
  params.x = a.x;
  params.residual = a.residual;
  params.weight = a.weight;
  params.normed = a.normed;
  params.total = a.total;
  params.q = static_cast<uint8_t*>(a.q);
  params.scale = static_cast<float*>(a.scale);
  params.rows = a.rows;
  params.x_stride = a.x_stride;
  params.residual_stride = a.residual_stride;
  params.scale_row_stride = a.scale_row_stride;
  params.scale_block_stride = a.scale_block_stride;
  params.columns = static_cast<int32_t>(a.columns);
  params.eps = static_cast<float>(a.eps);
  params.weight_type = static_cast<uint32_t>(a.weight_type);
  params.vectors = a.columns % 8 == 0 && rows_are_vectors(a.x, a.type, a.rows, a.x_stride, a.columns) &&
                   rows_are_vectors(a.residual, a.type, a.rows, a.residual_stride, a.columns) &&
                   aligned(a.weight, 16) && aligned(a.normed, 16) && aligned(a.total, 16) && aligned(a.q, 8);
  params.pow2_scale = a.pow2_scale;

  const bool by_warp = params.vectors && a.columns <= kNormColumnsByWarp;
  const int64_t ctas = by_warp ? (a.rows + 7) / 8 : a.rows;
  if (ctas > INT32_MAX) throw Error(std::string(op) + ": x has more rows than a grid covers");
  const size_t rows = row_span(a.rows, a.columns, a.columns, a.type);
  const size_t scales =
      a.scale != nullptr ? scale_span(a.rows, a.scale_row_stride, (a.columns + 127) / 128, a.scale_block_stride) : 0;
  Driver::of(op, target)
      .launch(op, by_warp ? warp : row, {static_cast<unsigned>(ctas), 1, 1}, params, target,
              {{a.x, row_span(a.rows, a.x_stride, a.columns, a.type), Access::kRead},
               {a.residual, a.residual != nullptr ? row_span(a.rows, a.residual_stride, a.columns, a.type) : 0,
                Access::kRead},
               {a.weight, row_span(1, 0, a.columns, a.weight_type), Access::kRead},
               {a.normed, rows, Access::kWrite},
               {a.total, a.residual != nullptr ? rows : 0, Access::kWrite},
               {a.q, a.q != nullptr ? static_cast<size_t>(a.rows * a.columns) : 0, Access::kWrite},
               {a.scale, scales, Access::kWrite}});
}

}  // namespace dsv3
