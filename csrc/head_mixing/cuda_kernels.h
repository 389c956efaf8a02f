// The launches of Re-Attention's CUDA kernels, for host code: each element type is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "head_mixing/cuda_arguments.h"

namespace vitkernels::head_mixing::cuda {

template <class T>
struct Launch {
  // Neither waits for the GPU. The first computes the logsumexp, where it is not known, and what is folded, where it is asked for.
  static cudaError_t lse(const Arguments& args, cudaStream_t stream);
  // cudaErrorInvalidConfiguration where a block would need more than shared_limit bytes of shared memory.
  static cudaError_t rows(const Arguments& args, int multiprocessors, int shared_limit, cudaStream_t stream);
};

}  // namespace vitkernels::head_mixing::cuda
