#include "memory.h"

#include <sys/mman.h>

#include <algorithm>

#include "ptx.h"

namespace ptxsim {

Arena& Arena::get() {
  static Arena* a = new Arena;
  return *a;
}

Arena::Arena() {
  size_ = 1ull << 36;
  void* p = mmap(nullptr, size_ + (1 << kShift), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("cannot reserve the simulator's address space");
  base_ = ((uint64_t)p + (1 << kShift) - 1) >> kShift << kShift;
  owner_.assign(size_ >> kShift, 0);
  buffers_.resize(1);
}

uint64_t Arena::allocate(size_t bytes, const std::string& name, bool writable, unsigned misalign) {
  size_t chunks = (bytes + misalign + 8 + (1 << kShift) - 1) >> kShift, total = owner_.size();
  // A buffer is followed by at least one chunk of nobody; freed chunks are used again only after the cursor has gone
  // round, so that a stale address finds nothing.
  size_t at = cursor_;
  for (size_t tries = 0;; ++tries) {
    if (tries > total) throw Error("out of simulated memory");
    if (at + chunks + 2 > total) at = 1;
    size_t i = 0;
    while (i < chunks + 2 && owner_[at - 1 + i] == 0) ++i;
    if (i == chunks + 2) break;
    at += i + 1;
  }
  cursor_ = at + chunks + 1;
  uint64_t start = base_ + ((uint64_t)at << kShift);
  if (mprotect((void*)start, chunks << kShift, PROT_READ | PROT_WRITE))
    throw Error("out of memory for a simulated buffer of ", bytes, " bytes");
  uint32_t id;
  if (freeIds_.empty()) {
    id = (uint32_t)buffers_.size();
    buffers_.emplace_back();
  } else {
    id = freeIds_.back();
    freeIds_.pop_back();
  }
  for (size_t i = 0; i < chunks; ++i) owner_[at + i] = id;
  Buffer& b = buffers_[id];
  b.begin = start + misalign;
  b.end = b.begin + bytes;
  b.writable = writable;
  b.live = true;
  b.name = name;
  b.host = nullptr;
  b.valid.clear();
  return b.begin;
}

void Arena::release(uint64_t address) {
  uint64_t off = address - base_;
  if (off >= size_ || owner_[off >> kShift] == 0) throw Error("release of an address that was never allocated");
  uint32_t id = owner_[off >> kShift];
  Buffer& b = buffers_[id];
  size_t first = (b.begin - base_) >> kShift, last = std::max(b.begin, b.end - (b.end > b.begin)) - base_;
  last = last >> kShift;
  while (last + 1 < owner_.size() && owner_[last + 1] == id) ++last;
  void* start = (void*)(base_ + ((uint64_t)first << kShift));
  size_t bytes = (last - first + 1) << kShift;
  madvise(start, bytes, MADV_DONTNEED);
  mprotect(start, bytes, PROT_NONE);
  for (size_t i = first; i <= last; ++i) owner_[i] = 0;
  b = Buffer();
  freeIds_.push_back(id);
}

std::string Arena::describe(uint64_t a, uint64_t bytes) const {
  char text[256];
  const Buffer* best = nullptr;
  uint64_t bestDistance = ~0ull;
  for (auto& b : buffers_) {
    if (!b.live) continue;
    uint64_t d = a < b.begin ? b.begin - a : a + bytes > b.end ? a + bytes - b.end : 0;
    if (d < bestDistance) bestDistance = d, best = &b;
  }
  if (!best || bestDistance > (1ull << 32)) {
    snprintf(text, sizeof text, "0x%llx is in no buffer", (unsigned long long)a);
  } else if (a < best->begin) {
    snprintf(text, sizeof text, "%llu bytes before buffer '%s' of %llu bytes", (unsigned long long)(best->begin - a),
             best->name.c_str(), (unsigned long long)(best->end - best->begin));
  } else {
    snprintf(text, sizeof text, "byte offset %llu of buffer '%s' of %llu bytes", (unsigned long long)(a - best->begin),
             best->name.c_str(), (unsigned long long)(best->end - best->begin));
  }
  return text;
}

}  // namespace ptxsim
