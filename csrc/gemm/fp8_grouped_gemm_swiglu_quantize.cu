// fp8_grouped_gemm_swiglu_quantize: the first half of an expert. With gate_up = A[rows of g] * B[g]^T in float32,
//
//   hidden = silu(gate) * up * weight of the row        q, scale = hidden in e4m3, a scale per row and 128 columns
//
// A tile is 128 rows by 128 columns of hidden: a CTA multiplies the same 128 rows by gate's 128 rows of B and by up's,
// which stand F further down, as two waves that share a partial sum. A block of 128 columns, which has one scale, is
// then in one warp's registers: nothing of gate_up touches memory, and nothing is rounded before the end. Products are
// promoted as fp8_grouped_gemm promotes them and hidden is made by silu_mul_quantize_1x128's expressions, so the result
// has the bits of the two ops in a row.
//
// Roles, barriers, the walk over groups: gemm/fp8_tile.cuh, fp8_grouped_gemm.cu
// Budget    per k-block as the 256x128 tile: 1024 tensor cycles, 1152 of shared memory (two warpgroups read 64 rows of
//           A and 128 of B twice, copies write 384 rows), 256 of FFMA; 2 x 64 results + 64 partial sums a thread; 4
//           stages, 202816 bytes. Output: 1 + 4/128 bytes per element instead of 8 written and 8 read.
// Epilogue  a row's 128 columns lie in four lanes: its largest magnitude takes two shuffles; codes are transposed among
//           the four, two shuffles per 32 columns, so that they leave as 8 bytes a lane, every sector whole.
#include "gemm/fp8_grouped_gemm_swiglu_quantize_params.h"
#include "gemm/fp8_tile.cuh"
#include "gemm/group_walk.cuh"
#include "quant/encode.cuh"
#include "quant/silu.cuh"

namespace dsv3 {
namespace {

// What fp8_tile.cuh's functions know of one wave: gate's or up's half of the right operand.
template <int kWave>
struct Wave {
  static constexpr int kRows = 128, kColumns = 128, kCtas = 1;
  static constexpr bool kSwapped = false;
  static constexpr int kM = 128, kN = 128, kWaves = 1, kResults = 64;
  static constexpr int kStages = kSwigluStages;
  static constexpr uint32_t kHalf = 128 * kTileK;  // bytes of 128 rows

  static constexpr uint32_t kLeftBytes = kHalf, kRightBytes = 2 * kHalf;  // of a stage
  static constexpr uint32_t kLeftScaleBytes = 128 * 4, kRightScaleBytes = 256 * 4;
  static constexpr uint32_t kLeft = 0;
  static constexpr uint32_t kRight = kStages * kLeftBytes + kWave * kHalf;
  static constexpr uint32_t kLeftScale = kStages * (kLeftBytes + kRightBytes);
  static constexpr uint32_t kRightScale = kLeftScale + kStages * kLeftScaleBytes + kWave * 128 * 4;
  static constexpr uint32_t kFull = kLeftScale + kStages * (kLeftScaleBytes + kRightScaleBytes);
  static constexpr uint32_t kEmpty = kFull + 8 * kStages;

  static_assert(kEmpty + 8 * kStages == kSwigluSharedBytes, "what the launcher asks for");
  static_assert(kSwigluSharedBytes <= 232448, "shared memory of one CTA on sm_90");
};
using Gate = Wave<0>;
using Up = Wave<1>;

// Warp 0, one lane: rows of A from `row` on, of gate from `column` on, of up F further.
__device__ __forceinline__ void load_three(uint32_t shared, Slot<Gate>& slot, const Fp8SwigluParams& p, int row,
                                           int group, int column) {
#pragma unroll 1
  for (int block = 0; block < p.blocks; ++block) {
    const uint32_t full = shared + Gate::kFull + 8 * slot.stage;
    ptx::mbarrier_wait_parity(shared + Gate::kEmpty + 8 * slot.stage, slot.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, Gate::kLeftBytes + Gate::kRightBytes);
    ptx::cp_async_bulk_tensor_3d_g2s(shared + Gate::kLeft + slot.stage * Gate::kLeftBytes, &p.a, full, block * kTileK,
                                     row, 0);
    ptx::cp_async_bulk_tensor_3d_g2s(shared + Gate::kRight + slot.stage * Gate::kRightBytes, &p.b, full, block * kTileK,
                                     column, group);
    ptx::cp_async_bulk_tensor_3d_g2s(shared + Up::kRight + slot.stage * Up::kRightBytes, &p.b, full, block * kTileK,
                                     p.f + column, group);
    slot.advance();
  }
}

// Warp 1: their scales. `rows` are what is left of the group; one beyond takes the last one's scale, as does a row of B
// beyond the last: their results are not stored.
template <BScale kScale>
__device__ __forceinline__ void load_three_scales(uint32_t shared, Slot<Gate>& slot, const Fp8SwigluParams& p, int row,
                                                  int rows, int group, int column) {
  const int lane = threadIdx.x % 32, last = min(128, rows) - 1;
  const float* a = p.a_scale.data + row * p.a_scale.row_stride;
  const uint32_t a_stride = static_cast<uint32_t>(p.a_scale.row_stride);
  const auto index = [&p](int row_of_b) { return p.b_scale.rows_per_scale == 1 ? row_of_b : row_of_b / 128; };
  const float* b = p.b_scale.data + group * p.b_scale.group_stride;
  const float* gate = b + index(column) * p.b_scale.row_stride;
  const float* up = b + index(p.f + column) * p.b_scale.row_stride;
  // With a scale per block, lane 0 copies gate's and lane 1 up's; else a lane four of each, of rows 32 apart.
  uint32_t gate_places[4], up_places[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int gate_row = min(column + lane + 32 * i, 2 * p.f - 1),
              up_row = min(p.f + column + lane + 32 * i, 2 * p.f - 1);
    const uint32_t stride = static_cast<uint32_t>(p.b_scale.row_stride);
    gate_places[i] = (index(gate_row) - index(column)) * stride;
    up_places[i] = (index(up_row) - index(p.f + column)) * stride;
  }
#pragma unroll 1
  for (int block = 0; block < p.blocks; ++block) {
    ptx::mbarrier_wait_parity(shared + Gate::kEmpty + 8 * slot.stage, slot.parity ^ 1);
    const uint32_t left = shared + Gate::kLeftScale + slot.stage * Gate::kLeftScaleBytes + 4 * lane;
    const uint32_t right = shared + Gate::kRightScale + slot.stage * Gate::kRightScaleBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::cp_async_ca_4(left + 128 * i, a + min(lane + 32 * i, last) * a_stride);
    if constexpr (kScale == BScale::kBlock) {
      if (lane < 2) ptx::cp_async_ca_4(right + 512 * lane, lane == 0 ? gate : up);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::cp_async_ca_4(right + 4 * lane + 128 * i, gate + gate_places[i]);
        ptx::cp_async_ca_4(right + 4 * lane + 128 * i + 512, up + up_places[i]);
      }
    }
    __syncwarp();
    ptx::cp_async_mbarrier_arrive_noinc(shared + Gate::kFull + 8 * slot.stage);
    a += p.a_scale.block_stride;
    gate += p.b_scale.block_stride;
    up += p.b_scale.block_stride;
    slot.advance();
  }
}

// One k-block of a wave, whose stage is full.
template <BScale kScale, class Which>
__device__ __forceinline__ void multiply_wave(uint32_t shared, const Slot<Gate>& slot, int warp, bool last,
                                              float (&results)[64]) {
  const Slot<Which> of{slot.stage, slot.parity};
  const Consumer<Which> me(warp);
  float d[64];
  const Running running = start_wave<kScale>(shared, of, me, 0, d);
  ptx::wgmma_wait_group<0>();
  promote<kScale>(shared, running, me, last, 128, d, results);
}

// Codes of 32 columns among the four lanes of a row: lane s has pairs[g], columns 8 g + 2 s and the next; it gets
// columns 8 s to 8 s + 7.
__device__ __forceinline__ uint2 transpose_codes(const uint32_t (&pairs)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t low_groups = pairs[0] | pairs[1] << 16, high_groups = pairs[2] | pairs[3] << 16;
  const uint32_t kept = high ? high_groups : low_groups;
  const uint32_t got = __shfl_xor_sync(~0u, high ? low_groups : high_groups, 2);
  const uint32_t lows = __byte_perm(kept, got, 0x5410), highs = __byte_perm(kept, got, 0x7632);
  const uint32_t mine = odd ? highs : lows;  // of this lane and of the one two away
  const uint32_t other = __shfl_xor_sync(~0u, odd ? lows : highs, 1);
  const uint32_t even_lane = odd ? other : mine, odd_lane = odd ? mine : other;
  const uint32_t near = __byte_perm(even_lane, odd_lane, 0x5410), far = __byte_perm(even_lane, odd_lane, 0x7632);
  return high ? make_uint2(far, near) : make_uint2(near, far);
}

// hidden, scale and codes of this warp's 16 rows; `rows` and `columns` are what is left of the group and of F.
__device__ __forceinline__ void store_hidden(const Fp8SwigluParams& p, const Consumer<Gate>& me, int64_t first_row,
                                             int column, int rows, int columns, float (&gate)[64],
                                             const float (&up)[64]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = me.row(0) + 8 * half;
    const int64_t at = first_row + row;
    const bool owned = row < rows;
    const float weight = p.weights != nullptr && owned ? p.weights[at * p.weight_stride] : 1.0f;
    float amax = 0.0f;
#pragma unroll
    for (int i = 2 * half; i < 64; i += (i & 1) ? 3 : 1) {
      const bool inside = 8 * (i >> 2) + me.column() + (i & 1) < columns;  // beyond F gate's rows are up's
      gate[i] = inside ? silu_mul(gate[i], up[i]) * weight : 0.0f;
      amax = ptx::max_nan_f32(amax, fabsf(gate[i]));
    }
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, 1));
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(~0u, amax, 2));
    const float scale = scale_of(amax, p.pow2_scale != 0);
    const float reciprocal = __frcp_rn(scale);
    if (owned && me.lane % 4 == 0) p.scale[at * p.scale_row_stride + column / 128 * p.scale_block_stride] = scale;
    uint8_t* q = p.q + at * p.f + column + 8 * (me.lane % 4);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      uint32_t pairs[4];
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const int i = 16 * part + 4 * group + 2 * half;
        pairs[group] = ptx::cvt_rn_satfinite_e4m3x2_f32(divide(gate[i], scale, reciprocal),
                                                        divide(gate[i + 1], scale, reciprocal));
      }
      const uint2 codes = transpose_codes(pairs);
      const int left = columns - 32 * part - 8 * (me.lane % 4);
      if (!owned || left <= 0) continue;
      if (p.vectors) {
        *reinterpret_cast<uint2*>(q + 32 * part) = codes;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i < left) q[32 * part + i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
        }
      }
    }
  }
}

template <BScale kScale>
__device__ __forceinline__ void gemm(const Fp8SwigluParams& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::cvta_to_shared(memory);
  const int warp = warp_index();
  initialise_ring<Gate>(shared, &p.a, &p.b, p.blocks);

  // Offsets that no caller may pass stay inside the tensors.
  const auto rows_of = [&p](int group) {
    const int begin = max(p.offsets[group], 0);
    return RowRange{begin, max(min(p.offsets[group + 1], p.rows) - begin, 0)};
  };
  // visit(group, row of A, rows left in the group, column of F): this CTA's tiles, in the same order for every warp.
  const auto for_each_tile = [&](auto visit) {
    GroupWalk<Gate::kRows> walk;
    GroupTile tile;
    for (int t = blockIdx.x; walk.find(t, p.groups, p.n_tiles, rows_of, tile); t += gridDim.x) {
      const TilePlace at = rasterise<Gate>(tile.tile, (tile.rows.count + 127) / 128, p.n_tiles);
      visit(tile.group, tile.rows.begin + at.m, tile.rows.count - at.m, at.n);
    }
  };

  Slot<Gate> slot;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) {
      const bool elected = ptx::elect_sync();
      for_each_tile([&](int group, int row, int, int column) {
        if (elected) load_three(shared, slot, p, row, group, column);
        __syncwarp();
      });
      ptx::griddepcontrol_launch_dependents();
    } else if (warp == 1) {
      for_each_tile([&](int group, int row, int rows, int column) {
        load_three_scales<kScale>(shared, slot, p, row, rows, group, column);
      });
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    const Consumer<Gate> me(warp);
    for_each_tile([&](int, int row, int rows, int column) {
      float gate[64] = {}, up[64] = {};
      for (int block = 0; block < p.blocks; ++block) {
        wait_full(shared, slot);
        multiply_wave<kScale, Gate>(shared, slot, warp, false, gate);
        multiply_wave<kScale, Up>(shared, slot, warp, true, up);
        slot.advance();
      }
      store_hidden(p, me, row, column, rows, p.f - column, gate, up);
    });
  }
}

}  // namespace
}  // namespace dsv3

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_swiglu_quantize_block(const __grid_constant__ dsv3::Fp8SwigluParams p) {
  dsv3::gemm<dsv3::BScale::kBlock>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_swiglu_quantize_row(const __grid_constant__ dsv3::Fp8SwigluParams p) {
  dsv3::gemm<dsv3::BScale::kRow>(p);
}
