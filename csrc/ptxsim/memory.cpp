#include "memory.h"

#include <sys/mman.h>

#include "ptx.h"

namespace ptxsim {

Arena::Arena() : owner_(size_ >> kShift) {
  void* p = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("cannot reserve the simulator's address space");
  base_ = (uint64_t)p;
}

Buffer& Arena::allocate(size_t bytes, const std::string& name, unsigned misalign) {
  const size_t chunks = (bytes + misalign + 8 + (1 << kShift) - 1) >> kShift, total = owner_.size();
  // A buffer is followed by at least one chunk of nobody; freed chunks are used again only after the cursor has gone
  // round, so that a stale address finds nothing.
  size_t at = cursor_;
  for (size_t tries = 0;; ++tries) {
    if (tries > total || chunks + 3 > total) throw Error("out of simulated memory");
    if (at + chunks + 2 > total) at = 1;
    auto first = owner_.begin() + (long)at - 1, last = first + (long)chunks + 2;
    auto used = std::find_if(first, last, [](Buffer* b) { return b; });
    if (used == last) break;
    at = (size_t)(used - owner_.begin()) + 2;
  }
  cursor_ = at + chunks + 1;
  const uint64_t start = base_ + ((uint64_t)at << kShift);
  if (mprotect((void*)start, chunks << kShift, PROT_READ | PROT_WRITE))
    throw Error("out of memory for a simulated buffer of ", bytes, " bytes");
  Buffer& b = buffers_[at];
  b.begin = start + misalign;
  b.end = b.begin + bytes;
  b.name = name;
  std::fill_n(owner_.begin() + (long)at, chunks, &b);
  return b;
}

void Arena::release(uint64_t address) {
  const Buffer* b = find(address, 0);
  if (!b) throw Error("release of an address that was never allocated");
  const size_t first = (b->begin - base_) >> kShift;
  size_t chunks = 0;
  for (; owner_[first + chunks] == b; ++chunks) owner_[first + chunks] = nullptr;
  void* start = (void*)(base_ + ((uint64_t)first << kShift));
  madvise(start, chunks << kShift, MADV_DONTNEED);
  mprotect(start, chunks << kShift, PROT_NONE);
  buffers_.erase(first);
}

std::string Arena::describe(uint64_t a, uint64_t bytes) const {
  const Buffer* best = nullptr;
  uint64_t bestDistance = 1ull << 32;
  for (auto& [chunk, b] : buffers_) {
    const uint64_t d = a < b.begin ? b.begin - a : a + bytes > b.end ? a + bytes - b.end : 0;
    if (d < bestDistance) bestDistance = d, best = &b;
  }
  char hex[32];
  snprintf(hex, sizeof hex, "0x%llx", (unsigned long long)a);
  if (!best) return cat(hex, " is in no buffer");
  const std::string buffer = cat("buffer '", best->name, "' of ", best->end - best->begin, " bytes");
  return a < best->begin ? cat(best->begin - a, " bytes before ", buffer)
                         : cat("byte offset ", a - best->begin, " of ", buffer);
}

}  // namespace ptxsim
