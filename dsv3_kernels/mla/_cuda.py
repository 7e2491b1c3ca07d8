"""The mla family's CUDA kernels: tensors become addresses, sizes and strides. Arguments were checked by the op."""
