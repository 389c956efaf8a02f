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

// A stack of blocks within one allocation; what does not fit is allocated by itself, and the stack grows to fit once it is empty.
struct Arena {
  char* base = nullptr;
  int64_t capacity = 0, used = 0, wanted = 0, open = 0;

  ~Arena() { std::free(base); }

  void* acquire(int64_t bytes) {
    if (open == 0) {
      if (wanted > capacity) {
        std::free(base);
        base = nullptr;  // stays consistent if the next line throws
        capacity = 0;
        base = static_cast<char*>(allocate(wanted));
        capacity = wanted;
      }
      wanted = 0;
    }
    ++open;
    wanted += bytes;  // an upper bound on the peak: it forgets releases
    if (wanted > kMostKept) wanted = kMostKept;
    if (used + bytes > capacity) return allocate(bytes);
    void* memory = base + used;
    used += bytes;
    return memory;
  }

  void release(void* memory, int64_t bytes) {
    --open;
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
