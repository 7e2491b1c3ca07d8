// Simulated address spaces. A global address is a host address inside one reserved arena in which every buffer stands
// alone between guard chunks; shared and local memory are 4 GB windows of the generic space.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptxsim {

constexpr uint64_t kSharedWindow = 1ull << 32;  // generic address of shared::cluster address 0
constexpr uint64_t kLocalWindow = 2ull << 32;
inline bool inShared(uint64_t a) { return (a >> 32) == 1; }
inline bool inLocal(uint64_t a) { return (a >> 32) == 2; }

struct Buffer {
  uint64_t begin = 0, end = 0;
  bool writable = true;
  bool predecessor = false;  // the launch before may still use it: see Launch::early
  std::string name;
  // Of each byte of a buffer the kernel may not read before it wrote: 1 = written. nullptr: it may.
  std::unique_ptr<uint8_t, void (*)(void*)> valid{nullptr, free};
  void track() {  // by calloc, which takes memory only where it is touched
    valid.reset((uint8_t*)calloc(end - begin, 1));
    if (!valid) throw std::bad_alloc();
  }
  uint8_t* validAt(uint64_t a) const { return valid ? valid.get() + (a - begin) : nullptr; }
};

class Arena {
 public:
  static Arena& get() {
    static Arena* arena = new Arena;
    return *arena;
  }
  // Zero-filled memory of `bytes` whose address is `misalign` past a multiple of 1024.
  Buffer& allocate(size_t bytes, const std::string& name, unsigned misalign = 0);
  void release(uint64_t address);
  // The buffer that holds all of [a, a+bytes), or nullptr.
  Buffer* find(uint64_t a, uint64_t bytes) {
    const uint64_t off = a - base_;
    Buffer* b = off < size_ ? owner_[off >> kShift] : nullptr;
    return b && a >= b->begin && a + bytes <= b->end ? b : nullptr;
  }
  std::string describe(uint64_t a, uint64_t bytes) const;  // for out-of-bounds reports

 private:
  Arena();
  static constexpr unsigned kShift = 16;
  static constexpr uint64_t size_ = 1ull << 36;
  uint64_t base_ = 0;
  std::vector<Buffer*> owner_;        // of each chunk, nullptr: nobody
  std::map<size_t, Buffer> buffers_;  // by first chunk
  size_t cursor_ = 1;
};

}  // namespace ptxsim
