// The launches of the CUDA kernels, for host code: each element type is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "cascaded_group/cuda_arguments.h"

namespace vitkernels::cascaded_group::cuda {

template <class T>
struct Launch {
  // Each needs shared_bytes of its layout, and a workspace and partial sums for `blocks` blocks. Nothing here waits for the GPU.
  static cudaError_t forward(const ForwardArguments& args, int64_t blocks, cudaStream_t stream);
  static cudaError_t backward(const BackwardArguments& args, int64_t blocks, cudaStream_t stream);
  static cudaError_t weight_gradients(const float* partial, int64_t blocks, int64_t total, const WeightGradients& gradients, cudaStream_t stream);
};

}  // namespace vitkernels::cascaded_group::cuda
