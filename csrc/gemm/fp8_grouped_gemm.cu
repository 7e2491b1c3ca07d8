// fp8_grouped_gemm: D[rows of g] = A[rows of g] * B[g]^T, where group g owns rows offsets[g] to offsets[g + 1] of A and
// D. E4M3 with a scale per row of A and per 128 x 128 block (or row) of each B[g].
//
// Tiles start at a group's first row, wherever that is; the last one of a group loads rows of the next group, which it
// multiplies and does not store.
#include "gemm/fp8_groups.cuh"

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_128x128_block(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<128, 128>, dsv3::BScale::kBlock, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_128x128_row(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<128, 128>, dsv3::BScale::kRow, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_256x128_block(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<256, 128>, dsv3::BScale::kBlock, dsv3::Groups::kInARow>(p);
}

// A pair, named by what both CTAs have: the same rows of the same group.
extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_256x256_block(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<256, 128, 2>, dsv3::BScale::kBlock, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_64x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<64, 128>, dsv3::BScale::kRow, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_32x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<32, 128>, dsv3::BScale::kRow, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_16x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<16, 128>, dsv3::BScale::kRow, dsv3::Groups::kInARow>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_grouped_gemm_8x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<8, 128>, dsv3::BScale::kRow, dsv3::Groups::kInARow>(p);
}
