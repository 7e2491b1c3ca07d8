// The CUDA driver functions, on the CPU. Everything completes before it returns; streams are accepted and ignored.
#include <dlfcn.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "decode.h"
#include "race.h"
#include "tensormap.h"

#define SIM_API extern "C" __attribute__((visibility("default")))

namespace ptxsim {
namespace {

enum Result {
  Success = 0,
  InvalidValue = 1,
  OutOfMemory = 2,
  NotInitialized = 3,
  InvalidDevice = 101,
  InvalidPtx = 218,
  NotFound = 500,
  IllegalAddress = 700,
  LaunchOutOfResources = 701,
  LaunchFailed = 719,
  NotSupported = 801,
  InvalidHandle = 400
};

std::recursive_mutex gMutex;
thread_local std::string gLastError;
thread_local uint64_t gContext = 0;

int report(int code, const std::string& text) {
  gLastError = text;
  return code;
}

struct Library;
struct KernelHandle {
  Library* library;
  std::string name;
  std::unique_ptr<Kernel> kernel;  // decoded when first needed
  int maxDynamicShared = 48 * 1024;
  bool nonPortableCluster = false;
  Kernel& get();
};
struct Library {
  std::unique_ptr<Module> module;
  std::unordered_map<std::string, std::unique_ptr<KernelHandle>> kernels;
};
Kernel& KernelHandle::get() {
  if (!kernel) kernel = decodeKernel(*library->module, *library->module->funcByName.at(name));
  return *kernel;
}

// ---- tensors of the host: announced, copied in, copied back

struct Declared {
  uint64_t address, bytes;
  unsigned access;
};
thread_local std::vector<Declared> gDeclared;

struct Region {  // a union of declarations that overlap
  uint64_t begin, end, copy;
  bool read = false, write = false;
  std::vector<Declared> parts;
  std::vector<uint8_t> before;
};
std::vector<Region>* gRegions = nullptr;

// An address that ends one region and begins the next belongs to the latter.
uint64_t translate(uint64_t a, uint64_t bytes) {
  if (!gRegions) return 0;
  uint64_t end = 0;
  for (auto& r : *gRegions) {
    if (a < r.begin || a + bytes > r.end) continue;
    if (a < r.end) return a - r.begin + r.copy;
    end = a - r.begin + r.copy;
  }
  return end;
}

// Output of this size is not filled with a pattern: a tensor with huge strides takes memory only where it is written.
// Input of this size is copied but for pieces of zeros, which the fresh copy has already.
constexpr size_t kSparse = 1 << 28;

void copyInput(uint8_t* to, const uint8_t* from, size_t n) {
  constexpr size_t kPiece = 4096;
  static const uint8_t zeros[kPiece] = {};
  const size_t piece = n < kSparse ? n : kPiece;
  for (size_t i = 0; i < n; i += piece) {
    const size_t m = std::min(piece, n - i);
    if (piece == n || memcmp(from + i, zeros, m)) memcpy(to + i, from + i, m);
  }
}

std::vector<Region> copyIn(std::vector<Declared> list) {
  std::sort(list.begin(), list.end(), [](const Declared& x, const Declared& y) { return x.address < y.address; });
  std::vector<Region> regions;
  for (auto& d : list) {
    if (!d.bytes) continue;
    if (regions.empty() || d.address >= regions.back().end) {
      regions.emplace_back();
      regions.back().begin = d.address;
      regions.back().end = d.address + d.bytes;
    }
    Region& r = regions.back();
    r.end = std::max(r.end, d.address + d.bytes);
    r.read |= d.access & 1;
    r.write |= (d.access & 2) != 0;
    r.parts.push_back(d);
  }
  int index = 0;
  for (auto& r : regions) {
    const size_t n = r.end - r.begin;
    // As aligned as the host's pointer is, and never more than the allocator promises.
    r.copy = Arena::get().allocate(n, "buffer " + std::to_string(index++), r.write, (unsigned)(r.begin % 64));
    bool allRead = true, anyRead = false;
    for (auto& p : r.parts) allRead &= (p.access & 1) != 0, anyRead |= (p.access & 1) != 0;
    Buffer& b = *Arena::get().find(r.copy, 1);
    if (allRead) {
      copyInput((uint8_t*)r.copy, (const uint8_t*)r.begin, n);
    } else {
      if (n < kSparse) memset((void*)r.copy, 0xa5, n);
      b.valid.resize(n);
      for (auto& p : r.parts)
        if (p.access & 1) {
          memcpy((void*)(r.copy + (p.address - r.begin)), (void*)p.address, p.bytes);
          memset(b.valid.data() + (p.address - r.begin), 1, p.bytes);
        }
    }
    if (r.write && anyRead) r.before.assign((uint8_t*)r.copy, (uint8_t*)r.copy + n);
  }
  return regions;
}

// Only bytes that the kernel wrote go back: a span may contain somebody else's.
void copyBack(std::vector<Region>& regions) {
  for (auto& r : regions) {
    if (!r.write) continue;
    const size_t n = r.end - r.begin;
    const uint8_t* now = (uint8_t*)r.copy;
    uint8_t* host = (uint8_t*)r.begin;
    const auto& valid = Arena::get().find(r.copy, 1)->valid;
    if (r.before.empty()) {  // nothing was read, so that what is valid was written
      for (size_t i = 0; i < n;) {
        const void* at = memchr(valid.data() + i, 1, n - i);
        if (!at) break;
        i = (size_t)((const uint8_t*)at - valid.data());
        size_t j = i;
        while (j < n && valid[j]) ++j;
        memcpy(host + i, now + i, j - i);
        i = j;
      }
      continue;
    }
    for (size_t i = 0; i < n;) {
      if (now[i] == r.before[i] && (valid.empty() || !valid[i])) {
        ++i;
        continue;
      }
      size_t j = i;
      while (j < n && (now[j] != r.before[j] || (!valid.empty() && valid[j]))) ++j;
      memcpy(host + i, now + i, j - i);
      i = j;
    }
  }
}
void release(std::vector<Region>& regions) {
  for (auto& r : regions) Arena::get().release(r.copy);
  gRegions = nullptr;
}

// ---- launch

struct LaunchAttribute {  // CUlaunchAttribute
  int id, pad;
  union {
    char bytes[64];
    unsigned dim[3];
    int value;
  } v;
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], sharedBytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned numAttributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "the driver's layout");

Counters gCounters;
std::string gKernelName, gInstructions;

int launch(const LaunchConfig& cfg, KernelHandle& handle, void** params, void** extra) {
  Kernel& k = handle.get();
  const Func& f = *k.func;
  Launch l;
  l.kernel = &k;
  l.opt = options();
  l.rng.seed(l.opt.seed + 1);
  l.alias = translate;
  for (int d = 0; d < 3; ++d) l.grid[d] = cfg.grid[d], l.block[d] = cfg.block[d];
  l.dynShared = cfg.sharedBytes;
  for (int d = 0; d < 3; ++d)
    if (f.cluster[d]) l.clusterDim[d] = f.cluster[d], l.explicitCluster = true;
  for (unsigned i = 0; i < cfg.numAttributes; ++i)
    if (cfg.attributes[i].id == 4) {
      l.explicitCluster = true;
      for (int d = 0; d < 3; ++d) {
        if (f.cluster[d] && f.cluster[d] != cfg.attributes[i].v.dim[d])
          return report(InvalidValue, "the cluster size differs from the one the kernel was compiled for");
        l.clusterDim[d] = cfg.attributes[i].v.dim[d];
      }
    }
  auto n = [](uint64_t v) { return std::to_string(v); };
  uint64_t threads = 1;
  const unsigned maxBlock[3] = {1024, 1024, 64}, maxGrid[3] = {0x7fffffff, 65535, 65535};
  for (int d = 0; d < 3; ++d) {
    if (l.grid[d] < 1 || l.grid[d] > maxGrid[d])
      return report(InvalidValue, "grid dimension " + n(d) + " is " + n(l.grid[d]));
    if (l.block[d] < 1 || l.block[d] > maxBlock[d])
      return report(InvalidValue, "block dimension " + n(d) + " is " + n(l.block[d]));
    if (l.clusterDim[d] < 1 || l.grid[d] % l.clusterDim[d])
      return report(InvalidValue, "grid dimension " + n(d) + " of " + n(l.grid[d]) +
                                      " is no multiple of the cluster's " + n(l.clusterDim[d]));
    threads *= l.block[d];
    l.ctasPerCluster *= l.clusterDim[d];
  }
  if (threads > 1024) return report(InvalidValue, n(threads) + " threads per CTA; 1024 is the most");
  if (f.maxThreads && threads > f.maxThreads)
    return report(InvalidValue, n(threads) + " threads per CTA; the kernel was compiled for " + n(f.maxThreads));
  if (f.required)
    for (int d = 0; d < 3; ++d)
      if (l.block[d] != f.maxDim[d]) return report(InvalidValue, "the kernel requires another block size (.reqntid)");
  if (l.ctasPerCluster > (handle.nonPortableCluster ? 16u : 8u))
    return report(InvalidValue, "a cluster of " + n(l.ctasPerCluster) + " CTAs" +
                                    (handle.nonPortableCluster ? "" : " needs NON_PORTABLE_CLUSTER_SIZE_ALLOWED"));
  if ((int)l.dynShared > handle.maxDynamicShared)
    return report(InvalidValue, n(l.dynShared) + " bytes of dynamic shared memory; the kernel's attribute allows " +
                                    n((uint64_t)handle.maxDynamicShared));
  if (k.staticShared + l.dynShared > 232448)
    return report(InvalidValue, n(k.staticShared + l.dynShared) + " bytes of shared memory; a CTA may have 232448");
  l.threads = (unsigned)threads;
  l.warpsPerCta = (l.threads + kLanes - 1) / kLanes;
  if (f.maxnreg * l.warpsPerCta * kLanes > 65536)
    return report(LaunchOutOfResources,
                  n(f.maxnreg) + " registers for each of " + n(threads) + " threads; an SM has 65536");
  l.regsPerThread = f.maxnreg ? f.maxnreg : std::min(255u, 65536u / (l.warpsPerCta * kLanes)) / 8 * 8;
  const unsigned perSm = std::min(std::min(32u, 2048u / (l.warpsPerCta * kLanes)),
                                  233472u / (k.staticShared + l.dynShared + kSharedReserved));
  l.maxResident = std::max(1u, l.opt.sms * std::max(1u, perSm) / l.ctasPerCluster);

  if (params) {
    for (size_t i = 0; i < k.paramLayout.size(); ++i)
      memcpy(k.params + k.paramLayout[i].first, params[i], k.paramLayout[i].second);
  } else if (extra) {
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (void** e = extra; *e; e += 2) {
      if ((uintptr_t)*e == 1) buffer = e[1];
      if ((uintptr_t)*e == 2) bytes = *(size_t*)e[1];
    }
    if (!buffer || bytes < k.paramBytes) return report(InvalidValue, "the parameter buffer is too small");
    memcpy(k.params, buffer, k.paramBytes);
  } else if (k.paramBytes) {
    return report(InvalidValue, "no kernel parameters given");
  }
  std::vector<Declared> declared;
  declared.swap(gDeclared);
  std::vector<Region> regions = copyIn(declared);
  gRegions = &regions;
  for (uint32_t at = 0; at + 8 <= k.paramBytes; at += 8) {
    uint64_t v;
    memcpy(&v, k.params + at, 8);
    if (uint64_t moved = translate(v, 0)) memcpy(k.params + at, &moved, 8);
  }
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(0x1f80);
  std::unique_ptr<RaceState, void (*)(RaceState*)> race(l.opt.detect ? raceCreate(l) : nullptr, raceDestroy);
  l.race = race.get();
  profileStart(k);
  int code = Success;
  try {
    l.run();
    copyBack(regions);
  } catch (const Error& e) {
    code = report(strstr(e.what(), "out-of-bounds global") ? IllegalAddress : LaunchFailed, e.what());
  }
  _mm_setcsr(mxcsr);
  release(regions);
  gCounters = l.n;
  gKernelName = k.name;
  gInstructions = instructionCounts(k);
  profileEnd(k);
  return code;
}

bool setOption(const std::string& name, const std::string& value) {
  Options& o = options();
  auto number = [&] { return strtoull(value.c_str(), nullptr, 0); };
  if (name == "seed")
    o.seed = number();
  else if (name == "timing") {
    if (value == "early")
      o.timing = Timing::Early;
    else if (value == "late")
      o.timing = Timing::Late;
    else if (value == "random")
      o.timing = Timing::Random;
    else
      return false;
  } else if (name == "sms") {
    if (!number()) return false;
    o.sms = (unsigned)number();
  } else if (name == "order") {
    if (value != "forward" && value != "reverse" && value != "random") return false;
    o.order = value;
  } else if (name == "eager")
    o.eager = number();
  else if (name == "detect")
    o.detect = number();
  else if (name == "fp8_truncate")
    o.fp8Truncate = number();
  else if (name == "max_idle")
    o.maxIdle = number();
  else if (name == "banks")
    o.verbose = number();
  else
    return false;
  return true;
}
void readEnvironment() {  // DSV3_KERNELS_SIM="seed=3,timing=late"
  const char* e = getenv("DSV3_KERNELS_SIM");
  for (std::string s = e ? e : ""; !s.empty();) {
    size_t end = std::min(s.find(','), s.size()), eq = s.find('=');
    if (eq == std::string::npos || eq > end || !setOption(s.substr(0, eq), s.substr(eq + 1, end - eq - 1)))
      fprintf(stderr, "DSV3_KERNELS_SIM: bad option '%s'\n", s.substr(0, end).c_str());
    s = end < s.size() ? s.substr(end + 1) : "";
  }
}
struct Startup {
  Startup() { readEnvironment(); }
} gStartup;

template <class F>
int guarded(F f) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  try {
    return f();
  } catch (const Error& e) {
    return report(InvalidPtx, e.what());
  } catch (const std::bad_alloc&) {
    return report(OutOfMemory, "out of memory");
  }
}

}  // namespace
}  // namespace ptxsim

using namespace ptxsim;

// ---- what has nothing to do here
#define SIM_NOTHING(name, ...) \
  SIM_API int name(__VA_ARGS__) { return Success; }
SIM_NOTHING(cuInit, unsigned)
SIM_NOTHING(cuDevicePrimaryCtxRelease_v2, int)
SIM_NOTHING(cuCtxSynchronize, void)
SIM_NOTHING(cuStreamSynchronize, void*)
SIM_NOTHING(cuThreadExchangeStreamCaptureMode, int*)
SIM_NOTHING(cuFuncSetCacheConfig, void*, int)

SIM_API int cuDriverGetVersion(int* v) { return *v = 13000, Success; }
SIM_API int cuDeviceGet(int* d, int ordinal) {
  return ordinal ? report(InvalidDevice, "the simulator has one device") : (*d = 0, Success);
}
SIM_API int cuDeviceGetCount(int* n) { return *n = 1, Success; }
SIM_API int cuDeviceGetName(char* name, int len, int) {
  return snprintf(name, (size_t)len, "PTX simulator (sm_90a)"), Success;
}
SIM_API int cuDeviceGetAttribute(int* v, int attribute, int) {
  const std::pair<int, int> known[] = {
      {1, 1024},                 // threads per block
      {8, 49152},                // shared memory per block
      {10, 32},                  // warp size
      {12, 65536},               // registers per block
      {16, (int)options().sms},  // multiprocessors
      {39, 2048},                // threads per multiprocessor
      {75, 9},                   // compute capability
      {76, 0},
      {81, 233472},  // shared memory per multiprocessor
      {82, 65536},   // registers per multiprocessor
      {97, 232448},  // opt-in shared memory per block
      {120, 1},      // cluster launch
  };
  for (auto& k : known)
    if (k.first == attribute) return *v = k.second, Success;
  return report(InvalidValue, "device attribute " + std::to_string(attribute) + " is not modelled");
}
SIM_API int cuDevicePrimaryCtxRetain(void** c, int) { return *c = &options(), Success; }
SIM_API int cuCtxGetCurrent(void** c) { return *c = (void*)gContext, Success; }
SIM_API int cuCtxSetCurrent(void* c) { return gContext = (uint64_t)c, Success; }
SIM_API int cuCtxPushCurrent_v2(void* c) { return gContext = (uint64_t)c, Success; }
SIM_API int cuCtxPopCurrent_v2(void** c) {
  if (c) *c = (void*)gContext;
  return gContext = 0, Success;
}
SIM_API int cuCtxGetDevice(int* d) { return *d = 0, Success; }
SIM_API int cuGetErrorName(int e, const char** text) {
  static const std::pair<int, const char*> kNames[] = {
      {Success, "CUDA_SUCCESS"},
      {InvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {OutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {InvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {InvalidPtx, "CUDA_ERROR_INVALID_PTX"},
      {InvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {NotFound, "CUDA_ERROR_NOT_FOUND"},
      {IllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {LaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
      {LaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
      {NotSupported, "CUDA_ERROR_NOT_SUPPORTED"},
  };
  for (auto& k : kNames)
    if (k.first == e) return *text = k.second, Success;
  return *text = nullptr, InvalidValue;
}
// The text of this thread's last error: a driver knows only the code, the simulator knows what happened.
SIM_API int cuGetErrorString(int e, const char** text) {
  if (e == Success) return *text = "no error", Success;
  if (gLastError.empty()) return cuGetErrorName(e, text);
  return *text = gLastError.c_str(), Success;
}

SIM_API int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  return guarded([&]() -> int {
    const char* text = (const char*)code;
    if (!text) return report(InvalidValue, "no image");
    if (!memcmp(text, "\177ELF", 4) || !memcmp(text, "\x50\xed\x55\xba", 4))
      return report(NotSupported, "the simulator runs PTX text; it was given machine code");
    auto lib = std::make_unique<Library>();
    lib->module = parse(text, strlen(text));
    for (auto& f : lib->module->funcs)
      if (f->entry && f->hasBody) lib->kernels[f->name].reset(new KernelHandle{lib.get(), f->name, nullptr});
    *library = lib.release();
    return Success;
  });
}
SIM_API int cuLibraryUnload(void* library) {
  return guarded([&]() -> int {
    Library* lib = (Library*)library;
    for (auto& k : lib->kernels)
      if (k.second->kernel) Arena::get().release((uint64_t)k.second->kernel->params);
    for (auto& v : lib->module->vars)
      if (v->address) Arena::get().release(v->address);
    delete lib;
    return Success;
  });
}
SIM_API int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  return guarded([&]() -> int {
    auto& ks = ((Library*)library)->kernels;
    auto it = ks.find(name);
    if (it == ks.end()) return report(NotFound, std::string("the module has no kernel '") + name + "'");
    *kernel = it->second.get();
    return Success;
  });
}
SIM_API int cuLibraryGetGlobal(uint64_t* address, size_t* bytes, void* library, const char* name) {
  return guarded([&]() -> int {
    Module& m = *((Library*)library)->module;
    auto it = m.varByName.find(name);
    if (it == m.varByName.end()) return report(NotFound, std::string("the module has no variable '") + name + "'");
    if (address) *address = globalAddress(m, *it->second);
    if (bytes) *bytes = it->second->bytes;
    return Success;
  });
}
SIM_API int cuKernelGetFunction(void** function, void* kernel) {
  return guarded([&]() -> int {
    ((KernelHandle*)kernel)->get();
    *function = kernel;
    return Success;
  });
}
static int setAttribute(KernelHandle* h, int attribute, int value) {
  return guarded([&]() -> int {
    if (attribute == 8) {
      if (value < 0 || (uint32_t)value + h->get().staticShared > 232448)
        return report(InvalidValue,
                      std::to_string(value) + " bytes of dynamic shared memory are more than a CTA may have");
      h->maxDynamicShared = value;
    } else if (attribute == 14) {
      h->nonPortableCluster = value != 0;
    } else if (attribute != 9) {
      return report(InvalidValue, "function attribute " + std::to_string(attribute) + " is not modelled");
    }
    return Success;
  });
}
SIM_API int cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* bytes) {
  return guarded([&]() -> int {
    const auto& layout = ((KernelHandle*)kernel)->get().paramLayout;
    if (index >= layout.size()) return report(InvalidValue, "the kernel has no parameter " + std::to_string(index));
    if (offset) *offset = layout[index].first;
    if (bytes) *bytes = layout[index].second;
    return Success;
  });
}
SIM_API int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  return setAttribute((KernelHandle*)kernel, attribute, value);
}
SIM_API int cuFuncSetAttribute(void* f, int attribute, int value) {
  return setAttribute((KernelHandle*)f, attribute, value);
}
SIM_API int cuFuncGetAttribute(int* value, int attribute, void* f) {
  return guarded([&]() -> int {
    KernelHandle& h = *(KernelHandle*)f;
    switch (attribute) {
      case 0: *value = h.get().func->maxThreads ? (int)h.get().func->maxThreads : 1024; break;
      case 1: *value = (int)h.get().staticShared; break;
      case 3: *value = (int)h.get().localBytes; break;
      case 4: *value = h.get().func->maxnreg ? (int)h.get().func->maxnreg : 255; break;
      case 8: *value = h.maxDynamicShared; break;
      default: return report(InvalidValue, "function attribute " + std::to_string(attribute) + " is not modelled");
    }
    return Success;
  });
}
SIM_API int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  return guarded([&]() -> int {
    int code = InvalidHandle;
    if (function) code = launch(*(const LaunchConfig*)config, *(KernelHandle*)function, params, extra);
    gDeclared.clear();
    return code;
  });
}
SIM_API int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                           unsigned shared, void* stream, void** params, void** extra) {
  LaunchConfig c{{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&c, f, params, extra);
}
SIM_API int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                                   const uint64_t* strides, const uint32_t* box, const uint32_t* elementStrides,
                                   int interleave, int swizzle, int promotion, int fill) {
  std::string e =
      encodeTensorMap((TensorMap*)map, (unsigned)type, rank, (uint64_t)address, dims, strides, box, elementStrides,
                      (unsigned)interleave, (unsigned)swizzle, (unsigned)promotion, (unsigned)fill);
  return e.empty() ? Success : report(InvalidValue, "cuTensorMapEncodeTiled: " + e);
}
SIM_API int cuTensorMapReplaceAddress(void* map, void* address) {
  if (!address || (uint64_t)address % 16)
    return report(InvalidValue, "cuTensorMapReplaceAddress: the address must be a multiple of 16 bytes");
  ((TensorMap*)map)->address = (uint64_t)address;
  return Success;
}
SIM_API int cuMemAlloc_v2(uint64_t* p, size_t bytes) {
  return guarded([&]() -> int {
    if (!bytes) return report(InvalidValue, "zero bytes");
    *p = Arena::get().allocate(bytes, "cuMemAlloc of " + std::to_string(bytes) + " bytes");
    Arena::get().find(*p, 1)->valid.resize(bytes);
    return Success;
  });
}
SIM_API int cuMemFree_v2(uint64_t p) {
  return guarded([&]() -> int { return p ? Arena::get().release(p) : (void)0, Success; });
}
static void written(uint64_t a, size_t bytes) {
  if (!bytes) return;
  if (Buffer* b = Arena::get().find(a, bytes))
    if (!b->valid.empty()) memset(b->valid.data() + (a - b->begin), 1, bytes);
}
SIM_API int cuMemcpyHtoD_v2(uint64_t d, const void* s, size_t n) {
  return guarded([&]() -> int { return memcpy((void*)d, s, n), written(d, n), Success; });
}
SIM_API int cuMemcpyDtoH_v2(void* d, uint64_t s, size_t n) { return memcpy(d, (void*)s, n), Success; }
SIM_API int cuMemsetD8_v2(uint64_t d, unsigned char v, size_t n) {
  return guarded([&]() -> int { return memset((void*)d, v, n), written(d, n), Success; });
}
SIM_API int cuMemsetD32Async(uint64_t d, unsigned v, size_t n, void*) {
  return guarded([&]() -> int { return std::fill_n((uint32_t*)d, n, v), written(d, 4 * n), Success; });
}
SIM_API int cuGetProcAddress_v2(const char* symbol, void** fn, int, uint64_t, int* status) {
  static const char* kSuffix[] = {"", "_v2"};
  *fn = nullptr;
  for (auto s : kSuffix)
    if (!*fn) *fn = dlsym(RTLD_DEFAULT, (std::string(symbol) + s).c_str());
  Dl_info info;
  Dl_info self;
  bool ours = *fn && dladdr(*fn, &info) && dladdr((void*)&cuInit, &self) && info.dli_fbase == self.dli_fbase;
  if (!ours) {
    if (dladdr((void*)&cuInit, &self)) {
      void* h = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
      *fn = nullptr;
      for (auto s : kSuffix)
        if (!*fn && h) *fn = dlsym(h, (std::string(symbol) + s).c_str());
    }
  }
  if (status) *status = *fn ? 0 : 1;
  return *fn ? Success : report(NotFound, std::string(symbol) + " is not modelled");
}

// ---- not CUDA

// The next launch of this thread may read (access & 1) or write (access & 2) these bytes.
SIM_API int dsv3SimDeclareBuffer(const void* address, size_t bytes, unsigned access) {
  if (!(access & 3)) return report(InvalidValue, "access must be 1, 2 or 3");
  gDeclared.push_back({(uint64_t)address, bytes, access});
  return Success;
}
SIM_API const char* dsv3SimLastError() { return gLastError.c_str(); }
SIM_API int dsv3SimSetOption(const char* name, const char* value) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  return setOption(name, value) ? Success : report(InvalidValue, std::string("no option ") + name + "=" + value);
}
// Parses a module and decodes every kernel: what a build checks.
SIM_API int dsv3SimCheck(const char* ptx) {
  return guarded([&]() -> int {
    auto m = parse(ptx, strlen(ptx));
    for (auto& f : m->funcs)
      if (f->entry && f->hasBody) Arena::get().release((uint64_t)decodeKernel(*m, *f)->params);
    for (auto& v : m->vars)
      if (v->address) Arena::get().release(v->address);
    return Success;
  });
}
static size_t give(const std::string& s, char* out, size_t size) {
  if (size) {
    const size_t n = std::min(size - 1, s.size());
    memcpy(out, s.data(), n);
    out[n] = 0;
  }
  return s.size();
}
// What the last launch did, as JSON; returns the length.
SIM_API size_t dsv3SimCounters(char* out, size_t size) {
  std::lock_guard<std::recursive_mutex> lock(gMutex);
  const Counters& c = gCounters;
  const std::pair<const char*, uint64_t> values[] = {{"warp_instructions", c.warpInst},
                                                     {"thread_instructions", c.threadInst},
                                                     {"global_read", c.globalRead},
                                                     {"global_write", c.globalWrite},
                                                     {"atomic", c.atomics},
                                                     {"shared_read", c.sharedRead},
                                                     {"shared_write", c.sharedWrite},
                                                     {"shared_wavefronts", c.sharedWavefronts},
                                                     {"shared_ideal", c.sharedIdeal},
                                                     {"tma_read", c.tmaRead},
                                                     {"tma_write", c.tmaWrite},
                                                     {"wgmma", c.wgmma},
                                                     {"wgmma_cycles", c.wgmmaCycles},
                                                     {"mma", c.mma},
                                                     {"branches", c.branches},
                                                     {"divergent", c.divergent},
                                                     {"barriers", c.barriers}};
  std::string s = "{\"kernel\": \"" + gKernelName + "\"";
  for (auto& v : values) s += std::string(", \"") + v.first + "\": " + std::to_string(v.second);
  return give(s + ", \"instructions\": {" + gInstructions + "}}", out, size);
}
// Executions of the basic blocks of every kernel of that name, over all launches: see coverageOf. Returns the length.
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
