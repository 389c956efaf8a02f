// PyTorch's own thread pool, behind a plain function pointer so that per-ISA files include nothing of PyTorch.
#pragma once

#include <cstdint>

namespace vitkernels {

// How many work side by side on what the caller shares out: one where it already runs in a parallel region.
int64_t num_threads();

// Calls body(context, i) once for each i in [0, n), spread over the pool; serially if n is 1 or the caller already runs in a parallel region.
void parallel_for(int64_t n, void (*body)(void* context, int64_t i), void* context);

}  // namespace vitkernels
