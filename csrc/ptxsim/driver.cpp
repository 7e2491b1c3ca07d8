// The CUDA driver functions, on the CPU. Everything completes before it returns; streams are accepted and ignored.
#include <dlfcn.h>
#include <immintrin.h>

#include <mutex>

#include "decode.h"
#include "race.h"
#include "tensormap.h"

#define SIM_API extern "C" __attribute__((visibility("default")))

namespace ptxsim {

#define RESULTS(X)                                                                                                \
  X(Success, 0, SUCCESS), X(InvalidValue, 1, ERROR_INVALID_VALUE), X(OutOfMemory, 2, ERROR_OUT_OF_MEMORY),        \
      X(InvalidDevice, 101, ERROR_INVALID_DEVICE), X(InvalidPtx, 218, ERROR_INVALID_PTX),                         \
      X(InvalidHandle, 400, ERROR_INVALID_HANDLE), X(NotFound, 500, ERROR_NOT_FOUND),                             \
      X(IllegalAddress, 700, ERROR_ILLEGAL_ADDRESS), X(LaunchOutOfResources, 701, ERROR_LAUNCH_OUT_OF_RESOURCES), \
      X(LaunchFailed, 719, ERROR_LAUNCH_FAILED), X(NotSupported, 801, ERROR_NOT_SUPPORTED)
#define ENUMERATOR(name, code, cudaName) name = code
enum Result { RESULTS(ENUMERATOR) };
#undef ENUMERATOR

std::recursive_mutex gMutex;
thread_local std::string gLastError;
thread_local void* gContext;

struct Refused : Error {
  Result code;
  template <class... Parts>
  explicit Refused(Result c, const Parts&... why) : Error(why...), code(c) {}
};
template <Result kOtherwise = InvalidValue, class... Parts>
void require(bool ok, const Parts&... why) {
  if (!ok) throw Refused(kOtherwise, why...);
}

int failed(Result code, const char* text) { return gLastError = text, code; }
template <class F>
int guarded(F f) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  try {
    return f(), Success;
  } catch (const Refused& e) {
    return failed(e.code, e.what());
  } catch (const Error& e) {
    return failed(InvalidPtx, e.what());
  } catch (const std::bad_alloc&) {
    return failed(OutOfMemory, "out of memory");
  }
}

// ---- options

bool setOption(Options& o, const std::string& name, const std::string& value) {
  auto number = [&](auto& to) {
    to = (std::decay_t<decltype(to)>)strtoull(value.c_str(), nullptr, 0);
    return true;
  };
  auto choice = [&](auto& to, std::initializer_list<const char*> names) {
    auto it = std::find(names.begin(), names.end(), value);
    if (it != names.end()) to = (std::decay_t<decltype(to)>)(it - names.begin());
    return it != names.end();
  };
  if (name == "timing") return choice(o.timing, {"early", "late", "random"});
  if (name == "order") return choice(o.order, {"forward", "reverse", "random"});
  if (name == "sms") return strtoull(value.c_str(), nullptr, 0) && number(o.sms);
  if (name == "seed") return number(o.seed);
  if (name == "eager") return number(o.eager);
  if (name == "detect") return number(o.detect);
  if (name == "rounding") return choice(o.hardwareRounding, {"float32", "hardware"});
  if (name == "approximate") return number(o.approximate);
  if (name == "max_idle") return number(o.maxIdle);
  if (name == "banks") return number(o.verbose);
  return false;
}
Options gOptions = [] {  // DSV3_KERNELS_SIM="seed=3,timing=late"
  Options o;
  const char* e = getenv("DSV3_KERNELS_SIM");
  for (std::string_view list = e ? e : ""; !list.empty();) {
    const std::string option(cut(list, ','));
    std::string_view value = option, name = cut(value, '=');
    if (value.empty() || !setOption(o, std::string(name), std::string(value)))
      fprintf(stderr, "DSV3_KERNELS_SIM: bad option '%s'\n", option.c_str());
  }
  return o;
}();

// ---- modules

struct KernelHandle {
  Module& module;
  Func& func;
  std::unique_ptr<Kernel> kernel = nullptr;  // decoded when first needed
  int maxDynamicShared = 48 * 1024;
  bool nonPortableCluster = false;
  Kernel& get() {
    if (!kernel) kernel = decodeKernel(module, func);
    return *kernel;
  }
};
struct Library {
  std::unique_ptr<Module> module;
  std::unordered_map<std::string, KernelHandle> kernels;
  explicit Library(const char* text) : module(parse(text)) {
    for (auto& f : module->funcs)
      if (f->entry && f->hasBody) kernels.emplace(f->name, KernelHandle{*module, *f});
  }
  ~Library() {
    for (auto& k : kernels)
      if (k.second.kernel) Arena::get().release((uint64_t)k.second.kernel->params);
    for (auto& v : module->vars)
      if (v->address) Arena::get().release(v->address);
  }
};

// ---- tensors of the host: announced, copied in, copied back

struct Declared {
  uint64_t address, bytes;
  unsigned access;
};
thread_local std::vector<Declared> gDeclared;

struct Region {  // a union of declarations that overlap
  uint64_t begin, end;
  unsigned some = 0, every = 3;  // the accesses that some of the declarations, and every one of them, have
  Buffer* copy = nullptr;
  std::vector<uint8_t> before = {};
};
std::vector<Region> gRegions;  // of the launch that runs

// An address that ends one region and begins the next belongs to the latter.
uint64_t translate(uint64_t a, uint64_t bytes) {
  uint64_t end = 0;
  for (auto& r : gRegions) {
    if (a < r.begin || a + bytes > r.end) continue;
    end = a - r.begin + r.copy->begin;
    if (a < r.end) break;
  }
  return end;
}

// Output of this size is not filled with a pattern: a tensor with huge strides takes memory only where it is written.
// Input of this size is copied but for pieces of zeros, which the fresh copy has already.
constexpr size_t kSparse = 1 << 28;

void copyInput(uint8_t* to, const uint8_t* from, size_t n) {
  static const uint8_t zeros[4096] = {};
  const size_t piece = n < kSparse ? n : sizeof zeros;
  for (size_t i = 0; i < n; i += piece) {
    const size_t m = std::min(piece, n - i);
    if (piece == n || memcmp(from + i, zeros, m)) memcpy(to + i, from + i, m);
  }
}
void markWritten(uint64_t a, size_t bytes) {
  if (Buffer* b = Arena::get().find(a, bytes); b && b->valid) memset(b->validAt(a), 1, bytes);
}

void copyIn(std::vector<Declared> list) {
  std::sort(list.begin(), list.end(), [](const Declared& x, const Declared& y) { return x.address < y.address; });
  for (auto& d : list) {
    if (gRegions.empty() || d.address >= gRegions.back().end) gRegions.push_back({d.address, d.address});
    Region& r = gRegions.back();
    r.end = std::max(r.end, d.address + d.bytes);
    r.some |= d.access;
    r.every &= d.access;
  }
  for (auto& r : gRegions) {
    const size_t n = r.end - r.begin;
    // As aligned as the host's pointer is, and never more than the allocator promises.
    r.copy = &Arena::get().allocate(n, cat("buffer ", &r - gRegions.data()), (unsigned)(r.begin % 64));
    r.copy->writable = r.some & 2;
    if (r.every & 1) continue;
    if (n < kSparse) memset((void*)r.copy->begin, 0xa5, n);
    r.copy->track();
  }
  for (auto& d : list) {
    if (!(d.access & 1)) continue;
    const uint64_t to = translate(d.address, d.bytes);
    copyInput((uint8_t*)to, (const uint8_t*)d.address, d.bytes);
    markWritten(to, d.bytes);
  }
  for (auto& r : gRegions)
    if (r.some == 3) r.before.assign((uint8_t*)r.copy->begin, (uint8_t*)r.copy->end);
}

// Only bytes that the kernel wrote go back: a span may contain somebody else's.
void copyBack(const Region& r) {
  const size_t n = r.end - r.begin;
  const auto *now = (const uint8_t*)r.copy->begin, *valid = r.copy->valid.get();
  // Where nothing was read, what is valid was written.
  auto written = [&](size_t i) { return (valid && valid[i]) || (!r.before.empty() && now[i] != r.before[i]); };
  for (size_t i = 0, end; i < n; i = std::max(end, i + 1)) {
    if (r.before.empty()) {  // perhaps a large one, written in few places
      const void* at = memchr(valid + i, 1, n - i);
      if (!at) return;
      i = (size_t)((const uint8_t*)at - valid);
    }
    for (end = i; end < n && written(end);) ++end;
    memcpy((uint8_t*)r.begin + i, now + i, end - i);
  }
}

struct Running {  // what a launch changes is as before when it is over
  unsigned mxcsr = _mm_getcsr();
  ~Running() {
    _mm_setcsr(mxcsr);
    for (auto& r : gRegions)
      if (r.copy) Arena::get().release(r.copy->begin);
    gRegions.clear();
  }
};

// What the launches use that may still run when the next one is launched early.
thread_local std::vector<Declared> gPredecessors;
void markPredecessors(const std::vector<Declared>& declared) {
  for (auto& mine : declared)
    for (auto& other : gPredecessors)
      if (mine.address < other.address + other.bytes && other.address < mine.address + mine.bytes &&
          (mine.access | other.access) & 2)
        Arena::get().find(translate(mine.address, mine.bytes), mine.bytes)->predecessor = true;
}

// ---- launch

struct LaunchAttribute {  // CUlaunchAttribute
  int id, pad;
  unsigned value[16];
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], sharedBytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned numAttributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "the driver's layout");

Counters gCounters;
std::string gKernelName;

// The shape of a launch, checked against what the kernel and an SM allow.
void shape(Launch& l, const LaunchConfig& cfg, const KernelHandle& handle) {
  const Kernel& k = *l.kernel;
  const Func& f = handle.func;
  const unsigned* clusterDim = f.cluster[0] ? f.cluster : nullptr;
  for (unsigned i = 0; i < cfg.numAttributes; ++i) switch (cfg.attributes[i].id) {
      case 4: clusterDim = cfg.attributes[i].value; break;
      case 6: l.early = cfg.attributes[i].value[0]; break;
    }
  l.explicitCluster = clusterDim;
  const unsigned maxBlock[3] = {1024, 1024, 64}, maxGrid[3] = {0x7fffffff, 65535, 65535};
  for (int d = 0; d < 3; ++d) {
    const unsigned grid = l.grid[d] = cfg.grid[d], block = l.block[d] = cfg.block[d];
    const unsigned cluster = l.clusterDim[d] = clusterDim ? clusterDim[d] : 1;
    require(!f.cluster[d] || f.cluster[d] == cluster,
            "the cluster size differs from the one the kernel was compiled for");
    require(grid >= 1 && grid <= maxGrid[d], "grid dimension ", d, " is ", grid);
    require(block >= 1 && block <= maxBlock[d], "block dimension ", d, " is ", block);
    require(cluster >= 1 && grid % cluster == 0, "grid dimension ", d, " of ", grid,
            " is no multiple of the cluster's ", cluster);
    l.threads *= block;
    l.ctasPerCluster *= cluster;
  }
  require(l.threads <= 1024, l.threads, " threads per CTA; 1024 is the most");
  require(!f.maxThreads() || l.threads <= f.maxThreads(), l.threads, " threads per CTA; the kernel was compiled for ",
          f.maxThreads());
  require(!f.required || std::equal(l.block, l.block + 3, f.maxDim),
          "the kernel requires another block size (.reqntid)");
  require(l.ctasPerCluster <= (handle.nonPortableCluster ? 16 : 8), "a cluster of ", l.ctasPerCluster, " CTAs",
          handle.nonPortableCluster ? "" : " needs NON_PORTABLE_CLUSTER_SIZE_ALLOWED");
  l.dynShared = cfg.sharedBytes;
  require((int)l.dynShared <= handle.maxDynamicShared, l.dynShared,
          " bytes of dynamic shared memory; the kernel's attribute allows ", handle.maxDynamicShared);
  require(k.staticShared + l.dynShared <= kMaxShared, k.staticShared + l.dynShared,
          " bytes of shared memory; a CTA may have ", kMaxShared);
  l.warpsPerCta = (l.threads + kLanes - 1) / kLanes;
  const unsigned allocated = l.warpsPerCta * kLanes;
  require<LaunchOutOfResources>(f.maxnreg * allocated <= kRegisters, f.maxnreg, " registers for each of ", l.threads,
                                " threads; an SM has ", kRegisters);
  l.regsPerThread = f.maxnreg ? f.maxnreg : std::min(255u, kRegisters / allocated) / 8 * 8;
  const unsigned perSm =
      std::min({32u, kThreadsPerSm / allocated, kSharedPerSm / (k.staticShared + l.dynShared + kSharedReserved)});
  l.maxResident = std::max(1u, l.opt.sms * std::max(1u, perSm) / l.ctasPerCluster);
}

void setParameters(const Kernel& k, void** params, void** extra) {
  if (params) {
    for (auto& [offset, bytes] : k.paramLayout) memcpy(k.params + offset, *params++, bytes);
  } else if (extra) {
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (void** e = extra; *e; e += 2) {
      if ((uintptr_t)*e == 1) buffer = e[1];
      if ((uintptr_t)*e == 2) bytes = *(size_t*)e[1];
    }
    require(buffer && bytes >= k.paramBytes, "the parameter buffer is too small");
    memcpy(k.params, buffer, k.paramBytes);
  } else {
    require(!k.paramBytes, "no kernel parameters given");
  }
}

void launch(const LaunchConfig& cfg, KernelHandle& handle, void** params, void** extra,
            const std::vector<Declared>& declared) {
  Kernel& k = handle.get();
  Launch l;
  l.kernel = &k;
  l.opt = gOptions;
  l.rng.seed(l.opt.seed + 1);
  shape(l, cfg, handle);
  setParameters(k, params, extra);
  Running running;
  _mm_setcsr(0x1f80);  // IEEE: to nearest even, denormals kept
  profileStart(k);
  std::string failure;
  try {
    copyIn(declared);
    if (l.early) markPredecessors(declared);
    for (auto* word = (uint64_t*)k.params; word < (uint64_t*)k.params + k.paramBytes / 8; ++word)
      if (uint64_t moved = translate(*word, 0)) *word = moved;
    l.run();
    for (auto& r : gRegions)
      if (r.some & 2) copyBack(r);
  } catch (const Error& e) {
    failure = e.what();
  }
  gCounters = l.n;
  gKernelName = k.name;
  if (!l.early || l.waited) gPredecessors.clear();  // this launch has ended, and so have those before it
  if (l.signalled) gPredecessors.insert(gPredecessors.end(), declared.begin(), declared.end());
  const bool outside = failure.find("out-of-bounds global") != std::string::npos;
  if (!failure.empty()) throw Refused(outside ? IllegalAddress : LaunchFailed, failure);
}

size_t give(const std::string& s, char* out, size_t size) {
  if (size) out[s.copy(out, size - 1)] = 0;
  return s.size();
}

}  // namespace ptxsim

using namespace ptxsim;

// ---- what has nothing to do here
#define SIM_NOTHING(name, ...) \
  SIM_API int name(__VA_ARGS__) { return Success; }
SIM_NOTHING(cuInit, unsigned)
SIM_NOTHING(cuDevicePrimaryCtxRelease_v2, int)
SIM_NOTHING(cuThreadExchangeStreamCaptureMode, int*)
SIM_NOTHING(cuFuncSetCacheConfig, void*, int)
SIM_API int cuCtxSynchronize() { return gPredecessors.clear(), Success; }
SIM_API int cuStreamSynchronize(void*) { return cuCtxSynchronize(); }

SIM_API int cuDriverGetVersion(int* v) { return *v = 13000, Success; }
SIM_API int cuDeviceGet(int* d, int ordinal) {
  return guarded([&] { require<InvalidDevice>(ordinal == 0, "the simulator has one device"), *d = 0; });
}
SIM_API int cuDeviceGetCount(int* n) { return *n = 1, Success; }
SIM_API int cuDeviceGetName(char* name, int len, int) {
  return snprintf(name, (size_t)len, "PTX simulator (sm_90a)"), Success;
}
SIM_API int cuDeviceGetAttribute(int* v, int attribute, int) {
  const std::unordered_map<int, unsigned> known = {
      {1, 1024},            // threads per block
      {8, 49152},           // shared memory per block
      {10, kLanes},         // warp size
      {12, kRegisters},     // registers per block
      {16, gOptions.sms},   // multiprocessors
      {39, kThreadsPerSm},  // threads per multiprocessor
      {75, 9},
      {76, 0},             // compute capability
      {81, kSharedPerSm},  // shared memory per multiprocessor
      {82, kRegisters},    // registers per multiprocessor
      {97, kMaxShared},    // opt-in shared memory per block
      {120, 1},            // cluster launch
  };
  return guarded([&] {
    require(known.count(attribute), "device attribute ", attribute, " is not modelled");
    *v = (int)known.at(attribute);
  });
}
SIM_API int cuDevicePrimaryCtxRetain(void** c, int) { return *c = &gOptions, Success; }
SIM_API int cuCtxGetCurrent(void** c) { return *c = gContext, Success; }
SIM_API int cuCtxSetCurrent(void* c) { return gContext = c, Success; }
SIM_API int cuCtxPushCurrent_v2(void* c) { return cuCtxSetCurrent(c); }
SIM_API int cuCtxPopCurrent_v2(void** c) {
  if (c) *c = gContext;
  return cuCtxSetCurrent(nullptr);
}
SIM_API int cuCtxGetDevice(int* d) { return *d = 0, Success; }
SIM_API int cuGetErrorName(int e, const char** text) {
#define ROW(name, code, cudaName) std::make_pair((int)name, "CUDA_" #cudaName)
  static const std::unordered_map<int, const char*> kNames = {RESULTS(ROW)};
#undef ROW
  *text = kNames.count(e) ? kNames.at(e) : nullptr;
  return *text ? Success : InvalidValue;
}
// The text of this thread's last error: a driver knows only the code, the simulator knows what happened.
SIM_API int cuGetErrorString(int e, const char** text) {
  if (e == Success) return *text = "no error", Success;
  if (gLastError.empty()) return cuGetErrorName(e, text);
  return *text = gLastError.c_str(), Success;
}

SIM_API int cuLibraryLoadData(Library** library, const char* text, void*, void*, unsigned, void*, void*, unsigned) {
  return guarded([&] {
    require(text, "no image");
    require<NotSupported>(strncmp(text, "\177ELF", 4) && strncmp(text, "\x50\xed\x55\xba", 4),
                          "the simulator runs PTX text; it was given machine code");
    *library = new Library(text);
  });
}
SIM_API int cuLibraryUnload(Library* library) {
  return guarded([&] { delete library; });
}
SIM_API int cuLibraryGetKernel(KernelHandle** kernel, Library* library, const char* name) {
  return guarded([&] {
    auto it = library->kernels.find(name);
    require<NotFound>(it != library->kernels.end(), "the module has no kernel '", name, "'");
    *kernel = &it->second;
  });
}
SIM_API int cuLibraryGetGlobal(uint64_t* address, size_t* bytes, Library* library, const char* name) {
  return guarded([&] {
    Module& m = *library->module;
    auto it = m.varByName.find(name);
    require<NotFound>(it != m.varByName.end(), "the module has no variable '", name, "'");
    if (address) *address = globalAddress(m, *it->second);
    if (bytes) *bytes = it->second->bytes;
  });
}
SIM_API int cuKernelGetFunction(KernelHandle** function, KernelHandle* kernel) {
  return guarded([&] { kernel->get(), *function = kernel; });
}
SIM_API int cuKernelGetParamInfo(KernelHandle* kernel, size_t index, size_t* offset, size_t* bytes) {
  return guarded([&] {
    const auto& layout = kernel->get().paramLayout;
    require(index < layout.size(), "the kernel has no parameter ", index);
    if (offset) *offset = layout[index].first;
    if (bytes) *bytes = layout[index].second;
  });
}
SIM_API int cuFuncSetAttribute(KernelHandle* kernel, int attribute, int value) {
  return guarded([&] {
    require(attribute == 8 || attribute == 9 || attribute == 14, "function attribute ", attribute, " is not modelled");
    require(attribute != 8 || (value >= 0 && (uint32_t)value + kernel->get().staticShared <= kMaxShared), value,
            " bytes of dynamic shared memory are more than a CTA may have");
    if (attribute == 8) kernel->maxDynamicShared = value;
    if (attribute == 14) kernel->nonPortableCluster = value != 0;
  });
}
SIM_API int cuKernelSetAttribute(int attribute, int value, KernelHandle* kernel, int) {
  return cuFuncSetAttribute(kernel, attribute, value);
}
SIM_API int cuFuncGetAttribute(int* value, int attribute, KernelHandle* kernel) {
  return guarded([&] {
    switch (attribute) {
      case 0: *value = kernel->func.maxThreads() ? (int)kernel->func.maxThreads() : 1024; break;
      case 1: *value = (int)kernel->get().staticShared; break;
      case 3: *value = (int)kernel->get().localBytes; break;
      case 4: *value = kernel->func.maxnreg ? (int)kernel->func.maxnreg : 255; break;
      case 8: *value = kernel->maxDynamicShared; break;
      default: throw Refused(InvalidValue, "function attribute ", attribute, " is not modelled");
    }
  });
}
SIM_API int cuLaunchKernelEx(const LaunchConfig* config, KernelHandle* kernel, void** params, void** extra) {
  return guarded([&] {
    const auto declared = std::exchange(gDeclared, {});
    require<InvalidHandle>(kernel, "no kernel");
    launch(*config, *kernel, params, extra, declared);
  });
}
SIM_API int cuLaunchKernel(KernelHandle* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                           unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
  LaunchConfig c{{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&c, kernel, params, extra);
}
SIM_API int cuTensorMapEncodeTiled(TensorMap* map, unsigned type, uint32_t rank, uint64_t address, const uint64_t* dims,
                                   const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                                   unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
  return guarded([&] {
    const std::string e = encodeTensorMap(map, type, rank, address, dims, strides, box, elementStrides, interleave,
                                          swizzle, promotion, fill);
    require(e.empty(), "cuTensorMapEncodeTiled: ", e);
  });
}
SIM_API int cuTensorMapReplaceAddress(TensorMap* map, uint64_t address) {
  return guarded([&] {
    require(address && address % 16 == 0, "cuTensorMapReplaceAddress: the address must be a multiple of 16 bytes");
    map->address = address;
  });
}
SIM_API int cuMemAlloc_v2(uint64_t* p, size_t bytes) {
  return guarded([&] {
    require(bytes, "zero bytes");
    Buffer& b = Arena::get().allocate(bytes, cat("cuMemAlloc of ", bytes, " bytes"));
    b.track();
    *p = b.begin;
  });
}
SIM_API int cuMemFree_v2(uint64_t p) {
  return guarded([&] { p ? Arena::get().release(p) : (void)0; });
}
SIM_API int cuMemcpyHtoD_v2(uint64_t d, const void* s, size_t n) {
  return guarded([&] { memcpy((void*)d, s, n), markWritten(d, n); });
}
SIM_API int cuMemcpyDtoH_v2(void* d, uint64_t s, size_t n) { return memcpy(d, (void*)s, n), Success; }
SIM_API int cuMemsetD8_v2(uint64_t d, unsigned char v, size_t n) {
  return guarded([&] { memset((void*)d, v, n), markWritten(d, n); });
}
SIM_API int cuMemsetD32Async(uint64_t d, unsigned v, size_t n, void*) {
  return guarded([&] { std::fill_n((uint32_t*)d, n, v), markWritten(d, 4 * n); });
}
// Only the functions of this very library, wherever else the process has some of the same name.
SIM_API int cuGetProcAddress_v2(const char* symbol, void** fn, int, uint64_t, int* status) {
  Dl_info self;
  void* library = dladdr((void*)&cuInit, &self) ? dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD) : nullptr;
  *fn = library ? dlsym(library, symbol) : nullptr;
  if (library && !*fn) *fn = dlsym(library, cat(symbol, "_v2").c_str());
  if (status) *status = *fn ? 0 : 1;
  return guarded([&] { require<NotFound>(*fn, symbol, " is not modelled"); });
}

// ---- not CUDA

// The next launch of this thread may read (access & 1) or write (access & 2) these bytes.
SIM_API int dsv3SimDeclareBuffer(const void* address, size_t bytes, unsigned access) {
  return guarded([&] {
    require(access & 3, "access must be 1, 2 or 3");
    if (bytes) gDeclared.push_back({(uint64_t)address, bytes, access});
  });
}
SIM_API const char* dsv3SimLastError() { return gLastError.c_str(); }
SIM_API int dsv3SimSetOption(const char* name, const char* value) {
  return guarded([&] { require(setOption(gOptions, name, value), "no option ", name, "=", value); });
}
// Parses a module and decodes every kernel: what a build checks.
SIM_API int dsv3SimCheck(const char* ptx) {
  return guarded([&] {
    Library library(ptx);
    for (auto& k : library.kernels) k.second.get();
  });
}
// What the last launch did, as JSON; returns the length.
SIM_API size_t dsv3SimCounters(char* out, size_t size) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  std::string s = "{\"kernel\": \"" + gKernelName + "\"";
#define PRINT(name, field) s += cat(", \"" #name "\": ", gCounters.field)
  COUNTERS(PRINT);
#undef PRINT
  return give(s + ", \"instructions\": {" + instructionCounts() + "}}", out, size);
}
// Executions of the instructions of every kernel of that name, over all launches: see coverageOf. Returns the length.
SIM_API size_t dsv3SimCoverage(const char* kernel, char* out, size_t size) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  return give(coverageOf(kernel), out, size);
}
// The mnemonics of the opcode table.
SIM_API size_t dsv3SimOpcodes(char* out, size_t size) {
  std::string s;
  for (auto& row : opTable()) s += row.first + "\n";
  return give(s, out, size);
}
