#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace vitkernels {
namespace {

constexpr int64_t kAlignment = 64;
// Per thread. Larger needs are met by malloc each time: they run long enough not to notice.
constexpr int64_t kMostKept = 16 << 20;

int64_t aligned(int64_t bytes) { return bytes <= 0 ? kAlignment : (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void* allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(kAlignment, static_cast<size_t>(bytes));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// A stack of blocks within one allocation. What does not fit is allocated by itself, and once the stack is empty it grows to the most that was ever in use.
struct Arena {
  char* base = nullptr;
  int64_t capacity = 0, used = 0, live = 0, peak = 0;

  ~Arena() { std::free(base); }

  void* acquire(int64_t bytes) {
    if (live == 0 && peak > capacity) {
      std::free(base);
      base = nullptr;  // stays consistent if the next line throws
      capacity = 0;
      base = static_cast<char*>(allocate(peak));
      capacity = peak;
    }
    const bool fits = used + bytes <= capacity;
    void* memory = fits ? base + used : allocate(bytes);
    if (fits) used += bytes;
    live += bytes;
    if (live > peak) peak = live < kMostKept ? live : kMostKept;
    return memory;
  }

  void release(void* memory, int64_t bytes) {
    live -= bytes;
    if (memory >= base && memory < base + capacity) {
      used -= bytes;
    } else {
      std::free(memory);
    }
  }
};

thread_local Arena arena;

}  // namespace

void* acquire_scratch(int64_t bytes) { return arena.acquire(aligned(bytes)); }

void release_scratch(void* memory, int64_t bytes) { arena.release(memory, aligned(bytes)); }

}  // namespace vitkernels
