// A driver that does nothing and writes down what it was asked: what the tests of the launchers run against, and what
// the host's own time is measured with. Its functions are those of host/driver.h; `null*` are for the tests (ctypes).
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "host/cuda_abi.h"
#include "ptx/tensor_map_type.h"

namespace {

struct Launch {
  std::string kernel;
  unsigned grid[3], block[3], shared, cluster;
  int programmatic;
  uintptr_t stream;
  uintptr_t context;
  std::vector<unsigned char> params;
};

struct Declared {
  const void* address;
  size_t bytes;
  unsigned access;
};

struct Kernel {
  std::string name;
  size_t param_bytes;
  int shared_limit = 0;
};

std::mutex mutex;
std::vector<Launch> launches;
std::map<std::string, int> calls;          // by function
std::map<std::string, CUresult> failures;  // what the next call of a function returns
bool recording = true;
thread_local std::vector<CUcontext> contexts;
thread_local std::vector<Declared> declared;
std::vector<Declared> last_declared;

// Counts the call and returns the error it is to fail with.
CUresult enter(const char* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!recording) return CUDA_SUCCESS;
  ++calls[function];
  const auto found = failures.find(function);
  if (found == failures.end()) return CUDA_SUCCESS;
  const CUresult error = found->second;
  failures.erase(found);
  return error;
}

// Size of the one struct parameter of an entry of PTX text; 0 when there is no such entry.
size_t param_bytes(const std::string& ptx, const std::string& name) {
  size_t at = ptx.find(".entry " + name + "(");
  if (at == std::string::npos) return 0;
  const size_t end = ptx.find(')', at);
  at = ptx.find('[', at);
  return at < end ? std::strtoull(ptx.c_str() + at + 1, nullptr, 10) : 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTER() \
  if (const CUresult error = enter(__func__)) return error

EXPORT CUresult cuInit(unsigned) {
  ENTER();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int* version) {
  ENTER();
  *version = 13000;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE                ? "CUDA_ERROR_INVALID_VALUE"
          : error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                                           : nullptr;
  return *text != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : nullptr;
  return *text != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER();
  *device = ordinal;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  ENTER();
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT       ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9
                                                                       : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER();
  *context = reinterpret_cast<CUcontext>(uintptr_t{0xC000} + static_cast<uintptr_t>(device));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER();
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER();
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  ENTER();
  if (contexts.empty()) return CUDA_ERROR_INVALID_VALUE;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  ENTER();
  static thread_local CUstreamCaptureMode now = CU_STREAM_CAPTURE_MODE_GLOBAL;
  const CUstreamCaptureMode before = now;
  now = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void* code, void*, void*, unsigned, void*, void*,
                                  unsigned) {
  ENTER();
  *library = reinterpret_cast<CUlibrary>(new std::string(static_cast<const char*>(code)));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  ENTER();
  const size_t bytes = param_bytes(*reinterpret_cast<std::string*>(library), name);
  if (bytes == 0) return CUDA_ERROR_NOT_FOUND;
  *kernel = reinterpret_cast<CUkernel>(new Kernel{name, bytes});
  return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  ENTER();
  *function = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
  ENTER();
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    reinterpret_cast<Kernel*>(kernel)->shared_limit = value;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void**) {
  ENTER();
  const Kernel& kernel = *reinterpret_cast<Kernel*>(function);
  if (config->gridDimX == 0 || config->gridDimY == 0 || config->gridDimZ == 0 || contexts.empty() ||
      config->sharedMemBytes > static_cast<unsigned>(kernel.shared_limit)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!recording) {
    declared.clear();
    return CUDA_SUCCESS;
  }
  Launch launch{kernel.name,
                {config->gridDimX, config->gridDimY, config->gridDimZ},
                {config->blockDimX, config->blockDimY, config->blockDimZ},
                config->sharedMemBytes,
                1,
                0,
                reinterpret_cast<uintptr_t>(config->hStream),
                reinterpret_cast<uintptr_t>(contexts.back()),
                {}};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) launch.cluster = attribute.value.clusterDim.x;
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      launch.programmatic = attribute.value.programmaticStreamSerializationAllowed;
    }
  }
  const unsigned char* bytes = static_cast<const unsigned char*>(params[0]);
  launch.params.assign(bytes, bytes + kernel.param_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back(std::move(launch));
  last_declared = std::exchange(declared, {});
  return CUDA_SUCCESS;
}

// Fills the map with its arguments, so that a test finds them in the parameters: address, dims, box.
EXPORT CUresult cuTensorMapEncodeTiled(TensorMap* map, CUtensorMapDataType, uint32_t rank, void* address,
                                       const uint64_t* dims, const uint64_t*, const uint32_t* box, const uint32_t*,
                                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  ENTER();
  map->opaque[0] = reinterpret_cast<uint64_t>(address);
  for (uint32_t i = 0; i < rank; ++i) {
    map->opaque[1 + i] = dims[i];
    map->opaque[6 + i] = box[i];
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream) {
  ENTER();
  for (size_t i = 0; i < count; ++i) std::memcpy(reinterpret_cast<char*>(address) + 4 * i, &value, 4);
  return CUDA_SUCCESS;
}

EXPORT CUresult dsv3SimDeclareBuffer(const void* address, size_t bytes, unsigned access) {
  if (recording) declared.push_back({address, bytes, access});
  return CUDA_SUCCESS;
}

// For the tests.

EXPORT void nullReset() {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.clear();
  calls.clear();
  failures.clear();
  last_declared.clear();
  recording = true;
}

// Off: calls and launches are not written down, so that only the caller's own time is left.
EXPORT void nullRecord(int on) { recording = on != 0; }

EXPORT void nullFail(const char* function, CUresult error) {
  const std::lock_guard<std::mutex> lock(mutex);
  failures[function] = error;
}

EXPORT int nullCalls(const char* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  return calls[function];
}

EXPORT int nullLaunches() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(launches.size());
}

// grid 0-2, block 3-5, shared 6, cluster 7, programmatic 8, parameter bytes 9, stream 10, context 11.
EXPORT const char* nullLaunch(int index, uint64_t values[12]) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Launch& launch = launches.at(static_cast<size_t>(index));
  const uint64_t all[12] = {launch.grid[0],       launch.grid[1],  launch.grid[2],
                            launch.block[0],      launch.block[1], launch.block[2],
                            launch.shared,        launch.cluster,  static_cast<uint64_t>(launch.programmatic),
                            launch.params.size(), launch.stream,   launch.context};
  std::memcpy(values, all, sizeof all);
  return launch.kernel.c_str();
}

EXPORT const unsigned char* nullParams(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  return launches.at(static_cast<size_t>(index)).params.data();
}

// The buffers of the last launch: how many, and each one's address, bytes and access.
EXPORT int nullBuffers() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(last_declared.size());
}

EXPORT void nullBuffer(int index, uint64_t values[3]) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Declared& buffer = last_declared.at(static_cast<size_t>(index));
  values[0] = reinterpret_cast<uint64_t>(buffer.address);
  values[1] = buffer.bytes;
  values[2] = buffer.access;
}
