"""The gemm family: one file per op."""
