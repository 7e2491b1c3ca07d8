// Parameters of moe_gate and its gradient, shared by host and device.
#pragma once

#include <cstdint>

namespace dsv3 {

struct MoeGateParams {
  const float* logits;  // [tokens, num_experts], row stride below
  const float* bias;    // [num_experts], stride below, or nullptr
  float* weights;       // [tokens, top_k], contiguous
  int32_t* experts;     // [tokens, top_k], contiguous
  int64_t tokens;
  int64_t logits_stride;
  int64_t bias_stride;
  int32_t num_experts;
  int32_t group_size;
  int32_t num_groups;
  int32_t topk_groups;
  int32_t top_k;
  uint32_t group_reciprocal;  // ceil(2^32 / group_size): its high product with an expert is the expert's group
  float scaling;
  uint32_t normalize;
  uint32_t softmax;
};

struct MoeGateBackwardParams {
  const float* grad_weights;  // [tokens, top_k], contiguous
  const float* logits;        // [tokens, num_experts], row stride below
  const int32_t* experts;     // [tokens, top_k], contiguous
  float* grad_logits;         // [tokens, num_experts], contiguous
  int64_t tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  float scaling;
  uint32_t normalize;
  uint32_t softmax;
};

inline constexpr uint32_t kGateThreads = 256;  // 8 tokens, a warp each
inline constexpr int32_t kGateMostExperts = 512;
inline constexpr int32_t kGateMostGroups = 32;   // a lane each
inline constexpr int32_t kGateMostChoices = 32;  // a lane each
inline constexpr float kGateSumFloor = 1e-20f;   // keeps weights finite where every chosen score has underflowed

}  // namespace dsv3
