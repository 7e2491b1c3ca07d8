// moe_gate: the top_k experts of each token by biased score within its best groups, and their weights by unbiased
// score; and the gradient of the weights.
//
// Roles     one warp per token, 8 per CTA. Expert 32 i + l is value i of lane l: 8 values for up to 256 experts (_256),
//           16 for up to 512 (_512). Groups are ranked through the warp's own part of shared memory: as many lanes to a
//           group as a power of two allows each find the two best of a share, and merge. Then top_k rounds of: best of
//           a lane, best of the warp (redux on order-preserving integers), lowest index at that value.
// Barriers  none but __syncwarp
// Budget    bytes per token: 4 E read, 8 K written: 1088 at E = 256, K = 8. About 1500 warp instructions a token (PTX,
//           counted by the simulator; most of them integer: scores that have the same bits everywhere, and the ranks),
//           which is what bounds it: the bytes would take a fifth of that time.
// Order     scores, sums and quotients are the same bits as eager's (scores.cuh); equal values go to the lower index.
#include "moe/moe_gate_params.h"
#include "ptx/convert.cuh"

#include "moe/scores.cuh"

namespace dsv3 {
namespace {

constexpr uint32_t kNothing = 0;               // below every number's key
constexpr uint32_t kMinusInfinity = 0x7FFFFF;  // key_of(-inf)

// Integers in the order of the numbers; NaN is the largest, as PyTorch sorts it. No number here is -0.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return value != value ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

template <int kCount>
__device__ __forceinline__ void load_logits(const float* row, int count, float (&logits)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int expert = 32 * i + threadIdx.x % 32;
    logits[i] = expert < count ? row[expert] : __uint_as_float(0xFF800000);
  }
}

// The groups' bits, at lane group * lanes, that are among the topk_groups best by the sum of their two best keys.
template <int kCount>
__device__ __forceinline__ uint32_t open_groups(const MoeGateParams& p, const uint32_t (&keys)[kCount], int lanes,
                                                uint32_t* shared) {
  const int lane = threadIdx.x % 32, group = lane / lanes;
  // Groups are `lanes` words apart, so that the lanes of all of them read different banks where a group has 32 experts.
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int expert = 32 * i + lane;
    if (expert < p.num_experts) shared[expert + __umulhi(expert, p.group_reciprocal) * lanes] = keys[i];
  }
  __syncwarp();
  uint32_t best = kNothing, second = kNothing;
  if (group < p.num_groups) {
    const uint32_t* own = shared + group * (p.group_size + lanes);
    for (int i = lane % lanes; i < p.group_size; i += lanes) {
      second = max(second, min(best, own[i]));
      best = max(best, own[i]);
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const uint32_t other_best = __shfl_xor_sync(~0u, best, distance);
    const uint32_t other_second = __shfl_xor_sync(~0u, second, distance);
    second = max(max(second, other_second), min(best, other_best));
    best = max(best, other_best);
  }
  const uint32_t sum = key_of(__fadd_rn(value_of(best), value_of(second)));
  int better = 0;
  for (int other = 0; other < p.num_groups; ++other) {
    const uint32_t rival = __shfl_sync(~0u, sum, other * lanes);
    better += rival > sum || (rival == sum && other < group);
  }
  return __ballot_sync(~0u, group < p.num_groups && better < p.topk_groups);
}

template <int kCount>
__device__ __forceinline__ void gate(const MoeGateParams& p) {
  constexpr int kWords = 32 * kCount + 32;  // keys, and the space between groups
  __shared__ uint32_t shared[kGateThreads / 32][kWords];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kGateThreads / 32) + warp;
  if (token >= p.tokens) return;  // whole warps leave

  float scores[kCount];
  uint32_t keys[kCount];
  load_logits(p.logits + token * p.logits_stride, p.num_experts, scores);
  if (p.softmax) {
    const Softmax softmax(scores);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = softmax(scores[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = sigmoid(scores[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int expert = 32 * i + lane;
    const float bias = p.bias != nullptr && expert < p.num_experts ? p.bias[expert * p.bias_stride] : 0.0f;
    keys[i] = expert < p.num_experts ? key_of(__fadd_rn(scores[i], bias)) : kNothing;
  }

  if (p.topk_groups < p.num_groups) {
    const int lanes = 1 << (31 - __clz(32 / p.num_groups));  // of a group
    const uint32_t open = open_groups(p, keys, lanes, shared[warp]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int expert = 32 * i + lane;
      const bool closed = !(open >> (__umulhi(expert, p.group_reciprocal) * lanes % 32) & 1);
      if (closed && expert < p.num_experts) keys[i] = kMinusInfinity;
    }
  }

  // Lane k keeps choice k.
  int expert = 0;
  float weight = 0.0f, sum = 0.0f;
  for (int k = 0; k < p.top_k; ++k) {
    uint32_t best = kNothing;
    int index = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (keys[i] > best) best = keys[i], index = 32 * i + lane;
    }
    const uint32_t top = __reduce_max_sync(~0u, best);
    const int winner = static_cast<int>(__reduce_min_sync(~0u, best == top ? static_cast<uint32_t>(index) : ~0u));
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (winner == 32 * i + lane) keys[i] = kNothing, score = scores[i];
    }
    score = __shfl_sync(~0u, score, winner % 32);
    sum = __fadd_rn(sum, score);
    if (lane == k) expert = winner, weight = score;
  }
  if (lane >= p.top_k) return;
  if (p.normalize) weight = __fdiv_rn(weight, __fadd_rn(sum, kGateSumFloor));
  p.weights[token * p.top_k + lane] = __fmul_rn(weight, p.scaling);
  p.experts[token * p.top_k + lane] = expert;
}

// With w = s / D, D = sum(s) + floor: ds = (g - sum(g w)) / D; then the derivative of the score.
template <int kCount>
__device__ __forceinline__ void gate_backward(const MoeGateBackwardParams& p) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kGateThreads / 32) + threadIdx.x / 32;
  if (token >= p.tokens) return;  // whole warps leave
  const float* row = p.logits + token * p.logits_stride;

  float scores[kCount];
  load_logits(row, p.num_experts, scores);
  // Lane k has choice k.
  const bool chooses = lane < p.top_k;
  const int expert = chooses ? p.experts[token * p.top_k + lane] : -1;
  const bool inside = expert >= 0 && expert < p.num_experts;
  float grad = chooses ? __fmul_rn(p.grad_weights[token * p.top_k + lane], p.scaling) : 0.0f;
  float chosen = inside ? row[expert] : 0.0f;
  if (p.softmax) {
    const Softmax softmax(scores);
    chosen = softmax(chosen);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = softmax(scores[i]);
  } else {
    chosen = sigmoid(chosen);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = sigmoid(scores[i]);
  }
  if (p.normalize) {
    float sum = 0.0f, dot = 0.0f;
    for (int k = 0; k < p.top_k; ++k) sum = __fadd_rn(sum, __shfl_sync(~0u, chosen, k));
    sum = __fadd_rn(sum, kGateSumFloor);
    const float share = __fmul_rn(grad, __fdiv_rn(chosen, sum));
    for (int k = 0; k < p.top_k; ++k) dot = __fadd_rn(dot, __shfl_sync(~0u, share, k));
    grad = __fdiv_rn(__fsub_rn(grad, dot), sum);
  }

  float grads[kCount] = {};
  for (int k = 0; k < p.top_k; ++k) {
    const int which = __shfl_sync(~0u, expert, k);
    const float value = __shfl_sync(~0u, grad, k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (which == 32 * i + lane) grads[i] = value;
    }
  }
  float dot = 0.0f;
  if (p.softmax) {
    float products[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) products[i] = __fmul_rn(grads[i], scores[i]);
    dot = lane_sum(products);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int at = 32 * i + lane;
    if (at >= p.num_experts) break;
    p.grad_logits[token * p.num_experts + at] =
        p.softmax ? __fmul_rn(scores[i], __fsub_rn(grads[i], dot))
                  : __fmul_rn(__fmul_rn(grads[i], scores[i]), __fsub_rn(1.0f, scores[i]));
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kGateThreads)
    moe_gate_256(const __grid_constant__ dsv3::MoeGateParams p) {
  dsv3::gate<8>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kGateThreads)
    moe_gate_512(const __grid_constant__ dsv3::MoeGateParams p) {
  dsv3::gate<16>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kGateThreads)
    moe_gate_backward_256(const __grid_constant__ dsv3::MoeGateBackwardParams p) {
  dsv3::gate_backward<8>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kGateThreads)
    moe_gate_backward_512(const __grid_constant__ dsv3::MoeGateBackwardParams p) {
  dsv3::gate_backward<16>(p);
}
