// fp8_masked_gemm: D[g, :counts[g]] = A[g, :counts[g]] * B[g]^T for A [G, Tmax, K]: every group has Tmax rows of memory
// and uses the first counts[g]. E4M3 with a scale per row of A and per 128 x 128 block (or row) of each B[g].
//
// The tensor map of A has the group as a dimension of its own, so that no tile reaches another group's rows whatever
// Tmax is.
#include "gemm/fp8_groups.cuh"

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_128x128_block(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<128, 128>, dsv3::BScale::kBlock, dsv3::Groups::kInPlanes>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_128x128_row(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<128, 128>, dsv3::BScale::kRow, dsv3::Groups::kInPlanes>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_64x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<64, 128>, dsv3::BScale::kRow, dsv3::Groups::kInPlanes>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_32x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<32, 128>, dsv3::BScale::kRow, dsv3::Groups::kInPlanes>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_16x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<16, 128>, dsv3::BScale::kRow, dsv3::Groups::kInPlanes>(p);
}

extern "C" __global__ void __launch_bounds__(dsv3::kThreads, 1)
    fp8_masked_gemm_8x128(const __grid_constant__ dsv3::Fp8GroupedGemmParams p) {
  dsv3::multiply_groups<dsv3::Tile<8, 128>, dsv3::BScale::kRow, dsv3::Groups::kInPlanes>(p);
}
