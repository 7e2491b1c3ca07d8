// Launchers of moe_gate and of its gradient.
#include "moe/moe_gate_params.h"
#include "moe/moe_launch.h"

namespace dsv3 {
namespace {

void check(const char* op, int64_t num_experts, int64_t num_groups, int64_t top_k) {
  if (num_experts > kGateMostExperts || num_groups > kGateMostGroups || top_k > kGateMostChoices) {
    throw Error(std::string(op) + ": more experts, groups or choices than a warp holds");
  }
}

Dim3 grid(const char* op, int64_t tokens) {
  constexpr int64_t kTokens = kGateThreads / 32;
  return {static_cast<unsigned>(to_int32(op, "tokens", (tokens + kTokens - 1) / kTokens)), 1, 1};
}

}  // namespace

void moe_gate(const MoeMatrix& logits, const MoeMatrix& bias, void* weights, void* experts, int64_t num_groups,
              int64_t topk_groups, int64_t top_k, double scaling, bool normalize, bool softmax, const Target& target) {
  static constexpr const char* kOp = "moe_gate";
  static constexpr const Kernel& kSmall = kernel("moe_gate_256");
  static constexpr const Kernel& kLarge = kernel("moe_gate_512");
  const int64_t tokens = logits.rows, num_experts = logits.columns;
  if (tokens == 0) return;
  check(kOp, num_experts, num_groups, top_k);

  const int64_t group_size = num_experts / num_groups;
  MoeGateParams params{};
  params.logits = static_cast<const float*>(logits.data);
  params.bias = static_cast<const float*>(bias.data);
  params.weights = static_cast<float*>(weights);
  params.experts = static_cast<int32_t*>(experts);
  params.tokens = tokens;
  params.logits_stride = logits.row_stride;
  params.bias_stride = bias.column_stride;
  params.num_experts = static_cast<int32_t>(num_experts);
  params.group_size = static_cast<int32_t>(group_size);
  params.num_groups = static_cast<int32_t>(num_groups);
  params.topk_groups = static_cast<int32_t>(topk_groups);
  params.top_k = static_cast<int32_t>(top_k);
  params.group_reciprocal = static_cast<uint32_t>(((int64_t{1} << 32) + group_size - 1) / group_size);
  params.scaling = static_cast<float>(scaling);
  params.normalize = normalize;
  params.softmax = softmax;
  const size_t chosen = static_cast<size_t>(tokens * top_k) * 4;
  Driver::of(kOp, target)
      .launch(kOp, num_experts <= 256 ? kSmall : kLarge, grid(kOp, tokens), params, target,
              {{logits.data, span(logits), Access::kRead},
               {bias.data, span(bias), Access::kRead},
               {weights, chosen, Access::kWrite},
               {experts, chosen, Access::kWrite}});
}

void moe_gate_backward(const void* grad_weights, const MoeMatrix& logits, const void* experts, void* grad_logits,
                       int64_t top_k, double scaling, bool normalize, bool softmax, const Target& target) {
  static constexpr const char* kOp = "moe_gate_backward";
  static constexpr const Kernel& kSmall = kernel("moe_gate_backward_256");
  static constexpr const Kernel& kLarge = kernel("moe_gate_backward_512");
  const int64_t tokens = logits.rows, num_experts = logits.columns;
  if (tokens == 0) return;
  check(kOp, num_experts, 1, top_k);

  MoeGateBackwardParams params{};
  params.grad_weights = static_cast<const float*>(grad_weights);
  params.logits = static_cast<const float*>(logits.data);
  params.experts = static_cast<const int32_t*>(experts);
  params.grad_logits = static_cast<float*>(grad_logits);
  params.tokens = tokens;
  params.logits_stride = logits.row_stride;
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  params.scaling = static_cast<float>(scaling);
  params.normalize = normalize;
  params.softmax = softmax;
  const size_t chosen = static_cast<size_t>(tokens * top_k) * 4;
  Driver::of(kOp, target)
      .launch(kOp, num_experts <= 256 ? kSmall : kLarge, grid(kOp, tokens), params, target,
              {{grad_weights, chosen, Access::kRead},
               {logits.data, span(logits), Access::kRead},
               {experts, chosen, Access::kRead},
               {grad_logits, static_cast<size_t>(tokens * num_experts) * 4, Access::kWrite}});
}

}  // namespace dsv3
