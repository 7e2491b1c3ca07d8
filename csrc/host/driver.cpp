#include "host/driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string_view>
#include <utility>

namespace dsv3 {
namespace {

constexpr const char* kCuda = "libcuda.so.1";
constexpr int kOldestVersion = 13000;  // the images are of CUDA 13; driver 580 is its first

thread_local Driver* chosen = nullptr;
thread_local bool early_launches = false;
std::atomic<uint64_t> counts[kNumKernels] = {};
std::atomic<bool> initialised{false};  // some driver of this process is
std::atomic<bool> forked{false};       // ... and this process is a child of the one that did it

size_t index_of(const Kernel& kernel) { return static_cast<size_t>(&kernel - kKernels); }

void refuse_fork(const char* op) {
  if (forked.load(std::memory_order_relaxed)) {
    throw Error(std::string(op) +
                ": this process was forked after its parent had used the GPU, and CUDA does not survive a fork; start "
                "workers with the 'spawn' or 'forkserver' method");
  }
}

// Images lie beside this module, in the package.
std::string image_directory() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&image_directory), &info);
  const std::string module = info.dli_fname != nullptr ? info.dli_fname : "";
  return module.substr(0, module.rfind('/') + 1) + "images/";
}

std::string read_image(const char* op, const std::string& name) {
  const std::string path = image_directory() + name;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(std::string(op) + ": the image " + path + " is missing; `dsv3 info` says why");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::string words(const char* label, Dim3 dim) {
  std::ostringstream text;
  text << label << " (" << dim.x << ", " << dim.y << ", " << dim.z << ")";
  return text.str();
}

}  // namespace

// Makes the device's primary context current for one call, as torch does, and puts back what was there.
class Driver::Scope {
 public:
  Scope(Driver& driver, const char* op, int ordinal) : driver_(driver) {
    const CUcontext wanted = driver.context(op, ordinal);
    CUcontext now = nullptr;
    driver.check(driver.cuCtxGetCurrent_(&now), op, "cuCtxGetCurrent");
    if (now == wanted) return;
    driver.check(driver.cuCtxPushCurrent_v2_(wanted), op, "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~Scope() {
    CUcontext popped = nullptr;
    if (pushed_) driver_.cuCtxPopCurrent_v2_(&popped);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  Driver& driver_;
  bool pushed_ = false;
};

Driver::Driver(std::string path) : path_(std::move(path)) {}

Driver& Driver::at(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Driver>> drivers;
  refuse_fork("driver");
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Driver>& driver = drivers[path];
  if (!driver) driver.reset(new Driver(path));
  return *driver;
}

Driver* Driver::use(Driver* driver) { return std::exchange(chosen, driver); }

bool Driver::launch_early(bool early) { return std::exchange(early_launches, early); }

Driver& Driver::of(const char* op, const Target& target) {
  refuse_fork(op);
  Driver* driver = chosen;
  if (driver == nullptr && target.device >= 0) {
    static Driver& cuda = at(kCuda);
    driver = &cuda;
  } else if (driver == nullptr) {
    const char* named = std::getenv("DSV3_KERNELS_DRIVER");
    if (named == nullptr || *named == '\0') {
      throw Error(std::string(op) + ": a CUDA kernel runs on CPU tensors only in the simulator: use backend(\"sim\")");
    }
    driver = &at(named);
  }
  if (!driver->ready_.load(std::memory_order_acquire)) driver->initialise();
  if (driver->drop_in() != (target.device < 0)) {
    throw Error(std::string(op) + ": " + driver->path_ +
                (target.device < 0 ? " takes CUDA tensors, got CPU tensors" : " takes CPU tensors, got CUDA tensors"));
  }
  return *driver;
}

void Driver::initialise() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ready_.load(std::memory_order_relaxed)) return;
  void* library = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    throw Error(path_ == kCuda ? std::string("no NVIDIA driver: ") + (why != nullptr ? why : path_)
                               : "the driver named " + path_ + " does not load: " + (why != nullptr ? why : ""));
  }
  std::string missing;
#define DSV3_FIND(name, parameters)                                     \
  name##_ = reinterpret_cast<decltype(name##_)>(dlsym(library, #name)); \
  if (name##_ == nullptr) missing += missing.empty() ? #name : ", " #name;
  DSV3_DRIVER_FUNCTIONS(DSV3_FIND)
#undef DSV3_FIND
  if (!missing.empty()) {
    throw Error(path_ + " lacks " + missing + (path_ == kCuda ? "; driver 580 or newer is needed" : ""));
  }
  declare_buffer_ = reinterpret_cast<DeclareBuffer>(dlsym(library, "dsv3SimDeclareBuffer"));
  check(cuInit_(0), path_.c_str(), "cuInit");
  int version = 0;
  check(cuDriverGetVersion_(&version), path_.c_str(), "cuDriverGetVersion");
  if (!drop_in() && version < kOldestVersion) {
    std::ostringstream text;
    text << "the NVIDIA driver supports CUDA " << version / 1000 << "." << version % 1000 / 10
         << "; the kernels need CUDA 13.0, which is driver 580 or newer";
    throw Error(text.str());
  }
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked.store(initialised.load()); }); });
  initialised.store(true);
  ready_.store(true, std::memory_order_release);
}

void Driver::check(CUresult error, const char* op, const char* call, const std::string& details) {
  if (error == CUDA_SUCCESS) return;
  const char *name = nullptr, *text = nullptr;
  cuGetErrorName_(error, &name);
  cuGetErrorString_(error, &text);
  std::ostringstream message;
  message << op << ": " << call << " failed: " << (name != nullptr ? name : "CUDA error " + std::to_string(error))
          << " (" << (text != nullptr ? text : "no text") << ")";
  if (!details.empty()) message << "; " << details;
  if (error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) {
    message << "; a stream is being captured: call dsv3_kernels.preload(device) before the capture";
  }
  throw Error(message.str());
}

int Driver::version() {
  if (!ready_.load(std::memory_order_acquire)) initialise();
  int version = 0;
  check(cuDriverGetVersion_(&version), path_.c_str(), "cuDriverGetVersion");
  return version;
}

int Driver::multiprocessors(const Target& target) {
  const int ordinal = target.device < 0 ? 0 : target.device;
  context("multiprocessors", ordinal);  // range check
  int value = multiprocessors_[ordinal].load(std::memory_order_relaxed);
  if (value == 0) {
    CUdevice device = 0;
    check(cuDeviceGet_(&device, ordinal), "multiprocessors", "cuDeviceGet");
    check(cuDeviceGetAttribute_(&value, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device), "multiprocessors",
          "cuDeviceGetAttribute");
    multiprocessors_[ordinal].store(value, std::memory_order_relaxed);
  }
  return value;
}

CUcontext Driver::context(const char* op, int ordinal) {
  if (ordinal >= kMaxDevices) throw Error(std::string(op) + ": device " + std::to_string(ordinal) + " is out of range");
  CUcontext context = contexts_[ordinal].load(std::memory_order_acquire);
  if (context != nullptr) return context;
  const std::lock_guard<std::mutex> lock(mutex_);
  if ((context = contexts_[ordinal].load(std::memory_order_relaxed)) != nullptr) return context;
  CUdevice device = 0;
  check(cuDeviceGet_(&device, ordinal), op, "cuDeviceGet", "device " + std::to_string(ordinal));
  check(cuDevicePrimaryCtxRetain_(&context, device), op, "cuDevicePrimaryCtxRetain");
  contexts_[ordinal].store(context, std::memory_order_release);
  return context;
}

CUkernel Driver::prepare(const char* op, const Kernel& kernel, int ordinal) {
  const size_t index = index_of(kernel);
  if ((configured_[index].load(std::memory_order_acquire) >> ordinal & 1) == 0) load(op, kernel, ordinal);
  return kernels_[index].load(std::memory_order_relaxed);
}

// Runs with the device's context current.
void Driver::load(const char* op, const Kernel& kernel, int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t index = index_of(kernel);
  if (configured_[index].load(std::memory_order_relaxed) >> ordinal & 1) return;

  // Loading is legal while another stream of this thread, or of the process, is captured only in the relaxed mode.
  struct Relaxed {
    Driver& driver;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    explicit Relaxed(Driver& d) : driver(d) { driver.cuThreadExchangeStreamCaptureMode_(&mode); }
    ~Relaxed() { driver.cuThreadExchangeStreamCaptureMode_(&mode); }
  } relaxed(*this);

  size_t first = 0;
  while (std::string_view(kKernels[first].image) != kernel.image) ++first;
  const std::string file = std::string(kernel.image) + (drop_in() ? ".ptx" : ".cubin");
  if (libraries_[first] == nullptr) {
    const std::string code = read_image(op, file);
    check(cuLibraryLoadData_(&libraries_[first], code.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), op,
          "cuLibraryLoadData", "image " + file);
  }
  const std::string details = std::string("kernel ") + kernel.name + ", image " + file;
  CUkernel handle = nullptr;
  check(cuLibraryGetKernel_(&handle, libraries_[first], kernel.name), op, "cuLibraryGetKernel", details);
  // Lazy loading would otherwise put this off until the launch.
  CUfunction function = nullptr;
  check(cuKernelGetFunction_(&function, handle), op, "cuKernelGetFunction", details);
  CUdevice device = 0;
  check(cuDeviceGet_(&device, ordinal), op, "cuDeviceGet", details);
  if (kernel.shared_bytes > 0) {
    check(cuKernelSetAttribute_(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(kernel.shared_bytes),
                                handle, device),
          op, "cuKernelSetAttribute",
          details + ", dynamic shared memory " + std::to_string(kernel.shared_bytes) + " bytes");
  }
  if (kernel.cluster > 8) {  // the largest that every GPU with clusters takes
    check(cuKernelSetAttribute_(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, handle, device), op,
          "cuKernelSetAttribute", details + ", cluster of " + std::to_string(kernel.cluster));
  }
  kernels_[index].store(handle, std::memory_order_relaxed);
  configured_[index].fetch_or(uint64_t{1} << ordinal, std::memory_order_release);
}

void Driver::launch_raw(const char* op, const Kernel& kernel, Dim3 grid, const void* params, const Target& target,
                        std::initializer_list<Buffer> buffers, const LaunchOptions& options) {
  const int ordinal = target.device < 0 ? 0 : target.device;
  const Scope scope(*this, op, ordinal);
  const CUkernel handle = prepare(op, kernel, ordinal);
  const unsigned shared = options.shared_bytes == options.kFromTable ? kernel.shared_bytes : options.shared_bytes;
  const unsigned cluster = options.cluster == options.kFromTable ? kernel.cluster : options.cluster;
  if (shared > kernel.shared_bytes || cluster > (kernel.cluster > 8 ? kernel.cluster : 8)) {
    throw Error(std::string(op) + ": kernel " + kernel.name + ": more shared memory or CTAs per cluster than its row");
  }

  CUlaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (cluster > 1) {
    CUlaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {cluster, 1, 1};
  }
  if ((early_launches || options.early) && kernel.waits) {
    CUlaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  CUlaunchConfig config{};
  config.gridDimX = grid.x, config.gridDimY = grid.y, config.gridDimZ = grid.z;
  config.blockDimX = kernel.threads, config.blockDimY = 1, config.blockDimZ = 1;
  config.sharedMemBytes = shared;
  config.hStream = reinterpret_cast<CUstream>(target.stream);
  config.attrs = attributes;
  config.numAttrs = num_attributes;

  if (drop_in()) {
    for (const Buffer& buffer : buffers) {
      check(declare_buffer_(buffer.address, buffer.bytes, static_cast<unsigned>(buffer.access)), op,
            "dsv3SimDeclareBuffer");
    }
  }
  void* parameters[] = {const_cast<void*>(params)};
  // cuda.h, cuLaunchKernelEx: a CUkernel may stand for the function; it then runs in the current context.
  const CUresult error = cuLaunchKernelEx_(&config, reinterpret_cast<CUfunction>(handle), parameters, nullptr);
  if (error != CUDA_SUCCESS) {
    std::ostringstream details;
    details << "kernel " << kernel.name << ", " << words("grid", grid) << ", " << words("block", {kernel.threads, 1, 1})
            << ", cluster " << cluster << ", dynamic shared memory " << shared << " bytes, device " << target.device;
    check(error, op, "cuLaunchKernelEx", details.str());
  }
  counts[index_of(kernel)].fetch_add(1, std::memory_order_relaxed);
}

void Driver::fill32(const char* op, void* address, uint32_t value, size_t count, const Target& target) {
  if (count == 0) return;
  const Scope scope(*this, op, target.device < 0 ? 0 : target.device);
  check(cuMemsetD32Async_(reinterpret_cast<CUdeviceptr>(address), value, count,
                          reinterpret_cast<CUstream>(target.stream)),
        op, "cuMemsetD32Async", std::to_string(count) + " words");
}

TensorMap Driver::encode(const char* op, const char* argument, CUtensorMapDataType type, uint32_t rank,
                         const void* address, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                         CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion) {
  static constexpr uint32_t kOnes[5] = {1, 1, 1, 1, 1};
  TensorMap map{};
  const CUresult error =
      cuTensorMapEncodeTiled_(&map, type, rank, const_cast<void*>(address), dims, strides, box, kOnes,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {  // the driver only says "invalid value": show it everything
    std::ostringstream details;
    details << "tensor map of " << argument << ": data type " << type << ", rank " << rank << ", address " << address;
    const auto list = [&details](const char* name, const auto* values, uint32_t count) {
      details << ", " << name << " (";
      for (uint32_t i = 0; i < count; ++i) details << (i > 0 ? ", " : "") << values[i];
      details << ")";
    };
    list("dims", dims, rank);
    list("strides in bytes", strides, rank - 1);
    list("box", box, rank);
    details << ", swizzle " << swizzle << ", L2 promotion " << promotion;
    check(error, op, "cuTensorMapEncodeTiled", details.str());
  }
  return map;
}

void Driver::preload(int device) {
  const int ordinal = device < 0 ? 0 : device;
  const Scope scope(*this, "preload", ordinal);
  for (const Kernel& kernel : kKernels) prepare("preload", kernel, ordinal);
}

uint64_t launch_count(const Kernel& kernel) { return counts[index_of(kernel)].load(std::memory_order_relaxed); }

void reset_launch_counts() {
  for (auto& count : counts) count.store(0, std::memory_order_relaxed);
}

}  // namespace dsv3
