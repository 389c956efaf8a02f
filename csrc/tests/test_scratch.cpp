// Working memory: aligned, never shared by two live buffers, and handed out again.
#include "common/scratch.h"

#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"

using vitkernels::Buffer;

namespace {

constexpr int64_t kMiB = 1 << 20;

bool aligned(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory) % 64 == 0; }

// Nested buffers of these sizes, each filled with its depth; on the way out every one still holds what was written into it.
void nest(const std::vector<int64_t>& sizes, size_t depth) {
  if (depth == sizes.size()) return;
  Buffer<int> buffer(sizes[depth]);
  CHECK(aligned(buffer), "%p is not aligned", static_cast<void*>(buffer));
  for (int64_t i = 0; i < sizes[depth]; ++i) buffer[i] = static_cast<int>(depth);
  nest(sizes, depth + 1);
  int64_t wrong = 0;
  for (int64_t i = 0; i < sizes[depth]; ++i) wrong += buffer[i] != static_cast<int>(depth);
  CHECK(wrong == 0, "%ld elements of buffer %zu were overwritten by a deeper one", long(wrong), depth);
}

void nested_buffers_do_not_overlap() {
  // The first round allocates one by one, the second comes from the grown block; sizes change between rounds.
  for (int round = 0; round < 3; ++round) {
    nest({1, 7, 0, 100, 3, 1000}, 0);
    nest({5 * kMiB, 1, 3 * kMiB, 17}, 0);  // more than is kept: some come from malloc each time
    nest({1000, 1, 1, 1}, 0);
  }
}

void memory_is_reused() {
  const auto use = [] {
    Buffer<double> outer(1000), inner(500);
    outer[0] = inner[0] = 1;
    return static_cast<void*>(inner.get());
  };
  use();
  void* const first = use();
  CHECK(use() == first, "the same call got other memory");
}

void threads_have_their_own() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      for (int round = 0; round < 200; ++round) {
        Buffer<int> a(100 + i), b(1000 * (i + 1));
        for (int k = 0; k < 100; ++k) a[k] = b[k] = i;
        for (int k = 0; k < 100; ++k) {
          if (a[k] != i || b[k] != i) std::abort();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  nested_buffers_do_not_overlap();
  memory_is_reused();
  threads_have_their_own();
  return vitkernels::test::finish();
}
