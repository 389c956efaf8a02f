// The __global__ functions and their launches, for one element type.
#pragma once

#include "cascaded_group/cuda_backward.h"
#include "cascaded_group/cuda_kernels.h"
#include "common/launch.cuh"

namespace vitkernels::cascaded_group::cuda {

// Two blocks a multiprocessor where a window is small; a 14 x 14 one has its scores in registers and needs them all.
constexpr int blocks_per_multiprocessor(int row_blocks) { return row_blocks <= 4 ? 2 : 1; }

template <class Arguments>
VITKERNELS_DEVICE Block this_block(const Arguments& args, char* shared) {
  return {shared, args.workspace + static_cast<int64_t>(blockIdx.x) * args.layout.workspace_bytes, blockIdx.x, gridDim.x};
}

template <class T, int kBlocks, bool kAnywhere>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kBlocks))
    cascaded_group_attention_fwd_kernel(const __grid_constant__ ForwardArguments args) {
  extern __shared__ __align__(16) char shared[];
  forward_block<T, kBlocks, kAnywhere>(this_block(args, shared), args);
}

template <class T, int kBlocks, bool kAnywhere>
__global__ void __launch_bounds__(kThreads, 1) cascaded_group_attention_bwd_kernel(const __grid_constant__ BackwardArguments args) {
  extern __shared__ __align__(16) char shared[];
  backward_block<T, kBlocks, kAnywhere>(this_block(args, shared), args);
}

template <class T>
__global__ void __launch_bounds__(kThreads) cascaded_group_attention_bwd_weights_kernel(
    const float* partial, int64_t blocks, int64_t total, const __grid_constant__ WeightGradients gradients) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < total) gradient_of_weight<T>(partial, blocks, total, gradients, at);
}

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), const Arguments& args, int64_t blocks, cudaStream_t stream) {
  return launch(kernel, args, blocks, kThreads, args.layout.shared_bytes, stream);
}

template <class T>
cudaError_t Launch<T>::forward(const ForwardArguments& args, int64_t blocks, cudaStream_t stream) {
  switch (variant_of(args.shape, args.layout.workspace_bytes)) {
    case Variant::kWindow4: return start(cascaded_group_attention_fwd_kernel<T, 1, false>, args, blocks, stream);
    case Variant::kWindow8: return start(cascaded_group_attention_fwd_kernel<T, 4, false>, args, blocks, stream);
    default: return start(cascaded_group_attention_fwd_kernel<T, kMaxRowBlocks, true>, args, blocks, stream);
  }
}

template <class T>
cudaError_t Launch<T>::backward(const BackwardArguments& args, int64_t blocks, cudaStream_t stream) {
  switch (variant_of(args.shape, args.layout.workspace_bytes)) {
    case Variant::kWindow4: return start(cascaded_group_attention_bwd_kernel<T, 1, false>, args, blocks, stream);
    case Variant::kWindow8: return start(cascaded_group_attention_bwd_kernel<T, 4, false>, args, blocks, stream);
    default: return start(cascaded_group_attention_bwd_kernel<T, kMaxRowBlocks, true>, args, blocks, stream);
  }
}

template <class T>
cudaError_t Launch<T>::weight_gradients(const float* partial, int64_t blocks, int64_t total, const WeightGradients& gradients, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  cascaded_group_attention_bwd_weights_kernel<T><<<grid, kThreads, 0, stream>>>(partial, blocks, total, gradients);
  return cudaGetLastError();
}

}  // namespace vitkernels::cascaded_group::cuda
