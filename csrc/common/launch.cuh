// How a kernel of one plain argument is started with as much shared memory as it asks for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vitkernels::cuda {

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& args, int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream) {
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  const int shared = static_cast<int>(shared_bytes);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared); error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace vitkernels::cuda
