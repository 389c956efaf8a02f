// Fresh memory of large tensors. glibc maps a block of 32 MiB and more by itself and unmaps it when it is freed, so each call faults in and clears every page
// anew: at 4 KiB a page that takes several times as long as to write the values.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitkernels {

constexpr int64_t kMappedAlone = int64_t{32} << 20;  // glibc's largest DEFAULT_MMAP_THRESHOLD_MAX

// Asks for pages of 2 MiB below a block that was just allocated and is about to be written as a whole. A hint: where the kernel does not heed it, nothing changes.
// For training, whose steps follow one another. A virtual machine may give free pages of that size back to its host after some seconds, and fetching them again
// takes longer than 512 small faults: a server that waits between its calls would lose (mobilevitv2_100 at batch 16 with 3 s of rest: 313 ms instead of 194).
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kMappedAlone) return;
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1), end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vitkernels
