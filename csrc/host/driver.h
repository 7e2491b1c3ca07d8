// The way to the GPU: a table of CUDA driver functions, found in libcuda.so.1 (or a drop-in) at the first launch.
//
// A drop-in is a shared library that exports the functions below by these very names: the PTX simulator and the tests'
// null driver are such. It is chosen by DSV3_KERNELS_DRIVER for the process or by `use_driver` for a thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <stdexcept>
#include <string>

#include "host/cuda_abi.h"
#include "host/kernels.h"
#include "ptx/tensor_map_type.h"

// X(name, parameters): every driver function in use. All return CUresult.
#define DSV3_DRIVER_FUNCTIONS(X)                                                                                      \
  X(cuInit, (unsigned flags))                                                                                         \
  X(cuDriverGetVersion, (int* version))                                                                               \
  X(cuGetErrorName, (CUresult error, const char** text))                                                              \
  X(cuGetErrorString, (CUresult error, const char** text))                                                            \
  X(cuDeviceGet, (CUdevice * device, int ordinal))                                                                    \
  X(cuDeviceGetAttribute, (int* value, CUdevice_attribute attribute, CUdevice device))                                \
  X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                                 \
  X(cuCtxGetCurrent, (CUcontext * context))                                                                           \
  X(cuCtxPushCurrent_v2, (CUcontext context))                                                                         \
  X(cuCtxPopCurrent_v2, (CUcontext * context))                                                                        \
  X(cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode * mode))                                                  \
  X(cuLibraryLoadData, (CUlibrary * library, const void* code, void* jit_options, void* jit_values, unsigned num_jit, \
                        void* library_options, void* library_values, unsigned num_library))                           \
  X(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char* name))                                     \
  X(cuKernelGetFunction, (CUfunction * function, CUkernel kernel))                                                    \
  X(cuKernelSetAttribute, (CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device))              \
  X(cuLaunchKernelEx, (const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra))           \
  X(cuTensorMapEncodeTiled,                                                                                           \
    (TensorMap * map, CUtensorMapDataType type, uint32_t rank, void* address, const uint64_t* dims,                   \
     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, CUtensorMapInterleave interleave, \
     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill))                     \
  X(cuMemsetD32Async, (CUdeviceptr address, unsigned value, size_t count, CUstream stream))

namespace dsv3 {

// How a kernel uses a buffer. The simulator copies in what is read and back what is written, and reports anything else.
enum class Access : unsigned { kRead = 1, kWrite = 2, kReadWrite = 3 };

// Not CUDA. A drop-in whose tensors are host memory exports
//
//   extern "C" CUresult dsv3SimDeclareBuffer(const void* address, size_t bytes, unsigned access);
//
// The launching thread calls it, once per buffer, before cuLaunchKernelEx: the next launch *of this thread* may read
// (access & 1) or write (access & 2) [address, address + bytes) and nothing else that is a host pointer; that launch
// uses the declarations up, whether it succeeds or not. A buffer is a span from the first to the last byte touched, so
// a strided tensor's span has gaps that belong to somebody else: what the kernel did not write must keep its bytes.
// Buffers reached only through a tensor map are declared like the others. Zero bytes are legal and mean nothing.
//
// A library that exports it takes images as PTX text (NUL-terminated) in cuLibraryLoadData; any other takes the cubin.
typedef CUresult (*DeclareBuffer)(const void* address, size_t bytes, unsigned access);

struct Buffer {
  const void* address;
  size_t bytes;
  Access access;
};

// A launch or its preparation failed; becomes RuntimeError in Python. The text names op, kernel and driver error.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where to launch: the tensors' device (CUDA ordinal, or -1 for CPU tensors, which only a drop-in takes) and the
// caller's stream on it.
struct Target {
  int device;
  uintptr_t stream;
};

// What a launch may ask for in place of its row of the table; a row holds the largest values.
struct LaunchOptions {
  static constexpr unsigned kFromTable = ~0u;
  unsigned shared_bytes = kFromTable;  // dynamic shared memory per CTA
  unsigned cluster = kFromTable;       // CTAs per cluster, along x
  bool early = false;                  // as inside launch_early: for the second kernel of an op
};

class Driver {
 public:
  // The driver for a launch of this thread: the one set by `use`, else libcuda.so.1 for CUDA tensors and
  // DSV3_KERNELS_DRIVER for CPU tensors. Throws Error when there is none or it cannot be loaded.
  static Driver& of(const char* op, const Target& target);
  // Sets this thread's driver (nullptr: none) and returns the one before.
  static Driver* use(Driver* driver);
  // Whether this thread's kernels that wait for their predecessor themselves (Kernel::waits) may be launched before it
  // ends (programmatic stream serialisation); returns what was so before.
  static bool launch_early(bool early);
  // The one instance per library.
  static Driver& at(const std::string& path);

  bool drop_in() const { return declare_buffer_ != nullptr; }
  const std::string& path() const { return path_; }
  int version();
  // SMs of the target's device, for the grids of persistent kernels.
  int multiprocessors(const Target& target);

  // Launches `kernel` with one parameter struct. `buffers` lists every memory range it touches. Counts the launch.
  template <class Params>
  void launch(const char* op, const Kernel& kernel, Dim3 grid, const Params& params, const Target& target,
              std::initializer_list<Buffer> buffers, const LaunchOptions& options = {}) {
    static_assert(sizeof(Params) <= 4096, "the simulator and CUDA before 12.1 take 4 KB of parameters");
    launch_raw(op, kernel, grid, &params, target, buffers, options);
  }

  // Fills with a 32-bit pattern on the stream: how a workspace is cleared.
  void fill32(const char* op, void* address, uint32_t value, size_t count, const Target& target);
  // Throws Error with every argument in its text.
  TensorMap encode(const char* op, const char* argument, CUtensorMapDataType type, uint32_t rank, const void* address,
                   const uint64_t* dims, const uint64_t* strides, const uint32_t* box, CUtensorMapSwizzle swizzle,
                   CUtensorMapL2promotion promotion);
  // Loads every image and kernel for `device` and makes its code resident, so that a stream capture need not.
  void preload(int device);

 private:
  class Scope;
  static constexpr int kMaxDevices = 64;  // the bits of `configured_`

  explicit Driver(std::string path);
  void initialise();
  void launch_raw(const char* op, const Kernel& kernel, Dim3 grid, const void* params, const Target& target,
                  std::initializer_list<Buffer> buffers, const LaunchOptions& options);
  void check(CUresult error, const char* op, const char* call, const std::string& details = "");
  CUcontext context(const char* op, int ordinal);
  CUkernel prepare(const char* op, const Kernel& kernel, int ordinal);
  void load(const char* op, const Kernel& kernel, int ordinal);

#define DSV3_MEMBER(name, parameters) CUresult(*name##_) parameters = nullptr;
  DSV3_DRIVER_FUNCTIONS(DSV3_MEMBER)
#undef DSV3_MEMBER
  DeclareBuffer declare_buffer_ = nullptr;

  const std::string path_;
  std::mutex mutex_;  // guards what is written below; the fast path only reads atomics
  std::atomic<bool> ready_{false};
  std::atomic<CUcontext> contexts_[kMaxDevices] = {};
  std::atomic<int> multiprocessors_[kMaxDevices] = {};
  CUlibrary libraries_[kNumKernels] = {};               // by the first kernel of the image
  std::atomic<CUkernel> kernels_[kNumKernels] = {};     // context-independent
  std::atomic<uint64_t> configured_[kNumKernels] = {};  // bit d: attributes are set on device d
};

// Launches by kernel since the last reset, on whatever driver.
uint64_t launch_count(const Kernel& kernel);
void reset_launch_counts();

}  // namespace dsv3
