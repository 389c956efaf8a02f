// The GPU a launch goes to, for host code of the CUDA library.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace vitkernels::cuda {

// A device as the launches need it: its current stream, its multiprocessors, and the shared memory one block can have.
struct Device {
  explicit Device(const torch::stable::Tensor& tensor) : index(tensor.get_device_index()), guard(index) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &handle));
    stream = static_cast<cudaStream_t>(handle);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  }
  int index, multiprocessors = 0, shared_limit = 0;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

}  // namespace vitkernels::cuda
