// Which kernel a product takes: a pure function of its sizes and the number of SMs, by a model that `explain` prints.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "gemm/fp8_params.h"
#include "gemm/launchers.h"
#include "host/kernels.h"

namespace dsv3 {

struct TileSize {
  int64_t m, n;  // rows and columns of D
};

// A kernel of such tiles, and which scales of B it takes.
struct Fp8Kernel {
  const Kernel* kernel;
  TileSize tile;  // of a cluster, whose CTAs stand side by side along N and share their copies of A
  int64_t ctas;   // of a cluster
  bool by_block, by_row;
  bool splits;  // takes clusters that share K out
  constexpr TileSize cta_tile() const { return {tile.m, tile.n / ctas}; }
  // Every CTA of a cluster has columns.
  constexpr bool takes(int64_t n) const { return (n + tile.n / ctas - 1) / (tile.n / ctas) % ctas == 0; }
};

// The row of a kernel of such tiles; one that does not say what fp8_tile.cuh needs does not compile.
constexpr Fp8Kernel fp8_kernel(std::string_view name, TileSize tile, bool by_block, bool by_row, bool splits = false) {
  const Kernel& row = kernel(name);
  const Fp8Kernel found{&row, tile, row.cluster, by_block, by_row, splits};
  const TileSize of_cta = found.cta_tile();
  if (row.threads != kFp8Threads ||
      row.shared_bytes != fp8_shared_bytes(static_cast<uint32_t>(of_cta.m), static_cast<uint32_t>(of_cta.n))) {
    throw "not such a kernel";
  }
  return found;
}

// Kernels of an op; the first of equals is taken.
inline constexpr Fp8Kernel kFp8Gemm[] = {
    fp8_kernel("fp8_gemm_8x128", {8, 128}, true, true, true),
    fp8_kernel("fp8_gemm_16x128", {16, 128}, true, true, true),
    fp8_kernel("fp8_gemm_32x128", {32, 128}, true, true, true),
    fp8_kernel("fp8_gemm_64x128", {64, 128}, true, true, true),
    fp8_kernel("fp8_gemm_128x128_block", {128, 128}, true, false),
    fp8_kernel("fp8_gemm_128x128_row", {128, 128}, false, true),
    fp8_kernel("fp8_gemm_128x192_block", {128, 192}, true, false),
    fp8_kernel("fp8_gemm_256x128_block", {256, 128}, true, false),
    fp8_kernel("fp8_gemm_128x256_block", {128, 256}, true, false),
    fp8_kernel("fp8_gemm_256x256_block", {256, 256}, true, false),
};
inline constexpr Fp8Kernel kFp8GroupedGemm[] = {
    fp8_kernel("fp8_grouped_gemm_8x128", {8, 128}, true, true),
    fp8_kernel("fp8_grouped_gemm_16x128", {16, 128}, true, true),
    fp8_kernel("fp8_grouped_gemm_32x128", {32, 128}, true, true),
    fp8_kernel("fp8_grouped_gemm_64x128", {64, 128}, true, true),
    fp8_kernel("fp8_grouped_gemm_128x128_block", {128, 128}, true, false),
    fp8_kernel("fp8_grouped_gemm_128x128_row", {128, 128}, false, true),
    fp8_kernel("fp8_grouped_gemm_256x128_block", {256, 128}, true, false),
    fp8_kernel("fp8_grouped_gemm_256x256_block", {256, 256}, true, false),
};
inline constexpr Fp8Kernel kFp8MaskedGemm[] = {
    fp8_kernel("fp8_masked_gemm_8x128", {8, 128}, true, true),
    fp8_kernel("fp8_masked_gemm_16x128", {16, 128}, true, true),
    fp8_kernel("fp8_masked_gemm_32x128", {32, 128}, true, true),
    fp8_kernel("fp8_masked_gemm_64x128", {64, 128}, true, true),
    fp8_kernel("fp8_masked_gemm_128x128_block", {128, 128}, true, false),
    fp8_kernel("fp8_masked_gemm_128x128_row", {128, 128}, false, true),
};
inline constexpr Fp8Kernel kFp8GroupedWgrad[] = {
    fp8_kernel("fp8_grouped_wgrad_128x128", {128, 128}, false, true),
    fp8_kernel("fp8_grouped_wgrad_256x128", {256, 128}, false, true),
    fp8_kernel("fp8_grouped_wgrad_256x256", {256, 256}, false, true),
};

// `groups` products of `m` by `n` over `blocks` k-blocks each; `out_bytes` are moved per element of D.
struct Fp8Product {
  int64_t groups, m, n, blocks, out_bytes;
  bool by_row;  // B has a scale per row
};

enum class Bound { kSharedMemory, kL2, kMemory };
constexpr const char* kBoundNames[] = {"shared memory", "L2", "memory"};

struct Fp8Plan {
  const Fp8Kernel* kernel;
  int64_t split;  // CTAs that share a tile's K
  int64_t tiles;  // of clusters
  int64_t waves;  // of CTAs that run at the same time
  int64_t ctas;   // at the same time, at most
  double cycles;  // predicted
  Bound bound;
  bool measured;  // taken from kFp8Measured
};

// The machine of the model: an H200. Datasheet: 1979 TFLOPS of 132 x 8192 operations a cycle, 4.8 TB/s of which nine
// tenths are taken to be reached. L2: what DeepGEMM's model for the H800 takes. Guesses: the latency (of a first copy
// to arrive and a last store to leave; of a cluster's exchange of sums), and that a tenth of what is not the bound
// shows all the same. No GPU has measured any of it.
constexpr int64_t kSms = 132;
constexpr double kClock = 1.83e9;
constexpr double kMemoryBytesPerCycle = 0.9 * 4.8e12 / kClock;
constexpr double kL2BytesPerCycle = 6150;
constexpr double kLatencyCycles = 2500;
constexpr double kExchangeCycles = 1500;
constexpr double kShown = 0.1;

inline int64_t tiles_along(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// Cycles of one tile by the budget in gemm/fp8_tile.cuh: shared memory at 128 bytes a cycle for each of `blocks`
// k-blocks (wgmma reads 64 rows of its left operand and all of its right one per warpgroup and wave; the copies write
// both), and the output at the 64 bytes a cycle that an SM sends to L2.
inline int64_t tile_cycles(TileSize tile, int64_t blocks, int64_t out_bytes) {
  const int64_t left = tile.m < 128 ? tile.n : tile.m, right = tile.m < 128 ? tile.m : tile.n;
  const int64_t block = left / 64 * (64 + right) + left + right;
  return blocks * block + tile.m * tile.n * out_bytes / 64;
}

// Clusters that run at the same time: pairs fill every GPC of an H100 or H200, which has 16 or 18 SMs; of larger ones a
// GPC is taken to hold what 16 SMs do.
inline int64_t resident_clusters(int64_t size, int64_t sms) { return size <= 2 ? sms / size : sms / 16 * (16 / size); }

inline Fp8Plan predict(const Fp8Kernel& kernel, int64_t split, const Fp8Product& x, int64_t sms) {
  const TileSize tile = kernel.tile;
  const int64_t cluster = kernel.ctas * split;
  const int64_t n_tiles = tiles_along(x.n, tile.n), tiles = x.groups * tiles_along(x.m, tile.m) * n_tiles;
  const int64_t at_once = std::max<int64_t>(resident_clusters(cluster, sms), 1), waves = tiles_along(tiles, at_once);
  const double k = 128.0 * static_cast<double>(x.blocks), groups = static_cast<double>(x.groups);
  const double d = groups * static_cast<double>(x.m * x.n * x.out_bytes);
  // Rows beyond M are filled in without being read.
  const double copied = groups * k * static_cast<double>(x.m * n_tiles + x.n * tiles_along(x.m, tile.m));
  const double once = groups * k * static_cast<double>(x.m + x.n);
  const double bounds[] = {
      static_cast<double>(waves * tile_cycles(kernel.cta_tile(), tiles_along(x.blocks, split), x.out_bytes)),
      (copied + d) / std::min(kL2BytesPerCycle, 64.0 * static_cast<double>(sms)),
      (once + d) / kMemoryBytesPerCycle,
  };
  const double* const longest = std::max_element(bounds, bounds + 3);
  const double others = bounds[0] + bounds[1] + bounds[2] - *longest;
  const double cycles = *longest + kShown * others + kLatencyCycles + (split > 1 ? kExchangeCycles : 0);
  return {&kernel, split, tiles, waves, at_once * cluster, cycles, static_cast<Bound>(longest - bounds), false};
}

// Choices that a GPU has measured to be better than the model's, for one N and K and up to `m` rows a group.
struct Fp8Measured {
  std::string_view kernel;
  int64_t split, groups, m, n, blocks;
  int64_t sms;
  std::string_view machine, date;
};
inline constexpr std::initializer_list<Fp8Measured> kFp8Measured = {};

// The kernel with the fewest predicted cycles for `x`. A cluster that shares out K has one tile to do: there must be
// SMs for all of them at once.
template <size_t kCount>
Fp8Plan choose(const Fp8Kernel (&kernels)[kCount], const Fp8Product& x, int64_t sms) {
  for (const Fp8Measured& row : kFp8Measured) {
    if (row.groups != x.groups || row.n != x.n || row.blocks != x.blocks || row.sms != sms || x.m > row.m) continue;
    for (const Fp8Kernel& kernel : kernels) {
      if (row.kernel != kernel.kernel->name || !(x.by_row ? kernel.by_row : kernel.by_block)) continue;
      Fp8Plan plan = predict(kernel, row.split, x, sms);
      plan.measured = true;
      return plan;
    }
  }
  Fp8Plan best{};
  for (const Fp8Kernel& kernel : kernels) {
    if (!(x.by_row ? kernel.by_row : kernel.by_block) || !kernel.takes(x.n) || kernel.ctas > sms) continue;
    for (int64_t split = 1; split <= (kernel.splits ? 8 : 1) && (split == 1 || split <= x.blocks); split *= 2) {
      const Fp8Plan plan = predict(kernel, split, x, sms);
      if (split > 1 && (plan.waves > 1 || resident_clusters(split, sms) == 0)) continue;
      if (best.kernel == nullptr || plan.cycles < best.cycles) best = plan;
    }
  }
  return best;
}

// `policy`: "auto" chooses; "fixed" keeps 128 x 128, whose results do not depend on M; "MxN" or "MxN/S" names a tile
// and how many CTAs share its K, for those who measure.
template <size_t kCount>
Fp8Plan plan(const Fp8Kernel (&kernels)[kCount], std::string_view policy, const Fp8Product& x, int64_t sms) {
  if (policy == "auto") return choose(kernels, x, sms);
  int64_t wanted[3] = {128, 128, 1};
  if (policy != "fixed") {
    const char *at = policy.data(), *const end = at + policy.size();
    for (int i = 0; i < 3 && at < end; ++i) {
      const auto [next, error] = std::from_chars(at, end, wanted[i]);
      if (error != std::errc()) wanted[0] = 0;  // no kernel's
      at = next + 1;
    }
  }
  for (const Fp8Kernel& kernel : kernels) {
    const bool fits =
        (x.by_row ? kernel.by_row : kernel.by_block) && kernel.takes(x.n) && (wanted[2] == 1 || kernel.splits);
    if (kernel.tile.m == wanted[0] && kernel.tile.n == wanted[1] && fits && wanted[2] >= 1 && 8 % wanted[2] == 0) {
      return predict(kernel, wanted[2], x, sms);
    }
  }
  throw std::invalid_argument("no such kernel: " + std::string(policy));
}

enum class Fp8Op { kGemm, kGroupedGemm, kMaskedGemm, kGroupedWgrad };

inline Fp8Op fp8_op(std::string_view name) {
  constexpr std::string_view kNames[] = {"fp8_gemm", "fp8_grouped_gemm", "fp8_masked_gemm", "fp8_grouped_wgrad"};
  const auto* const found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) throw std::invalid_argument("not an FP8 GEMM: " + std::string(name));
  return static_cast<Fp8Op>(found - std::begin(kNames));
}

// What a launcher knows: `rows` are M, all groups' rows (grouped), a group's memory (masked) or M (wgrad); `k` counts
// elements, of all groups (wgrad).
struct Fp8Sizes {
  int64_t groups, rows, n, k;
  bool by_row;
  int64_t out_bytes;
};

// What the launchers take, and `explain` prints. Only the device knows the groups' rows, or columns: they are taken as
// equal.
inline Fp8Plan plan_fp8(Fp8Op op, const Fp8Sizes& x, const GemmChoice& choice, int64_t device_sms) {
  const int64_t sms = choice.num_sms > 0 ? std::min<int64_t>(choice.num_sms, device_sms) : device_sms;
  const int64_t blocks = tiles_along(x.k, 128);
  Fp8Product product{x.groups, x.rows, x.n, blocks, x.out_bytes, x.by_row};
  switch (op) {
    case Fp8Op::kGroupedGemm:
      product.groups = std::min(x.groups, x.rows);
      product.m = tiles_along(x.rows, product.groups);
      return plan(kFp8GroupedGemm, choice.policy, product, sms);
    case Fp8Op::kMaskedGemm:
      if (choice.expected_m > 0) product.m = std::min(choice.expected_m, x.rows);
      return plan(kFp8MaskedGemm, choice.policy, product, sms);
    case Fp8Op::kGroupedWgrad:
      product.blocks = tiles_along(blocks, x.groups);
      return plan(kFp8GroupedWgrad, choice.policy, product, sms);
    default: return plan(kFp8Gemm, choice.policy, product, sms);
  }
}

}  // namespace dsv3
