// A TMA descriptor: 128 opaque bytes that the driver fills on the host (host/tensor_map.h) and the TMA unit reads from
// the kernel's parameters. Host and device share it, so that parameter structs need no CUDA header.
#pragma once

#include <cstdint>

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

static_assert(sizeof(TensorMap) == 128, "PTX ISA, tensor-map: 128 bytes");
