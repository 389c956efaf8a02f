// The __global__ functions of Re-Attention and their launches, for one element type.
#pragma once

#include "common/launch.cuh"
#include "head_mixing/cuda_forward.h"
#include "head_mixing/cuda_kernels.h"

namespace vitkernels::head_mixing::cuda {

template <class T, int kSteps>
__global__ void __launch_bounds__(32 * kLseWarps, 4) re_attention_lse_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(16) char shared[];
  const Team<kLseWarps> team{shared, blockIdx.x};
  if (blockIdx.x + 1 < gridDim.x) return lse_block<T, kSteps>(team, args);
  if (args.folded) fold_block(team, args);
}

template <class T, int kHeads, int kSteps, int kRowGroups>
__global__ void __launch_bounds__(32 * kRowGroups * kKeyGroups, 1) re_attention_rows_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(16) char shared[];
  rows_block<T, Plan<kHeads, kSteps, kRowGroups>>({shared, blockIdx.x}, args);
}

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T, int kSteps>
cudaError_t launch_lse(const Arguments& args, cudaStream_t stream) {
  const int64_t blocks = (args.lse_is_known ? 0 : args.batch * args.heads * pieces(args.tokens, kLseQueries)) + 1;
  return launch(re_attention_lse_kernel<T, kSteps>, args, blocks, 32 * kLseWarps, kLseShared<kSteps>, stream);
}

template <class T>
cudaError_t Launch<T>::lse(const Arguments& args, cudaStream_t stream) {
  return args.q.columns <= 32 ? launch_lse<T, 2>(args, stream) : launch_lse<T, 4>(args, stream);
}

template <class T, class P>
cudaError_t launch_rows(const Arguments& args, int64_t blocks, cudaStream_t stream) {
  return launch(re_attention_rows_kernel<T, P::kHeads, P::kSteps, P::kRowGroups>, args, blocks, 32 * P::kWarps, P::kShared, stream);
}

template <class P>
int64_t blocks_of(const Arguments& args) {
  return args.batch * pieces(args.value_dim, P::kColumns) * pieces(args.tokens, P::kQueries);
}

// 16, 32 or 64 queries a block, whichever takes the least time; of equals the most, which read keys and values less often.
template <class T, int kHeads, int kSteps>
cudaError_t launch_rows_of(const Arguments& args, int multiprocessors, int shared_limit, cudaStream_t stream) {
  const auto time = [&](auto plan) { return time_of<decltype(plan)>(blocks_of<decltype(plan)>(args), multiprocessors, shared_limit); };
  const auto start = [&](auto plan) { return launch_rows<T, decltype(plan)>(args, blocks_of<decltype(plan)>(args), stream); };
  const Plan<kHeads, kSteps, 1> one;
  const Plan<kHeads, kSteps, 2> two;
  const Plan<kHeads, kSteps, 4> four;
  const int64_t of_one = time(one), of_two = time(two), of_four = time(four);
  if constexpr (four.kShared <= kLargestShared) {
    if (of_four <= of_two && of_four <= of_one) return start(four);
  }
  if constexpr (two.kShared <= kLargestShared) {
    if (of_two <= of_one) return start(two);
  }
  return of_one < kNever ? start(one) : cudaErrorInvalidConfiguration;
}

template <class T, int kHeads>
cudaError_t launch_rows_for(const Arguments& args, int multiprocessors, int shared_limit, cudaStream_t stream) {
  if (steps_of(args.q.columns, args.value_dim) == 2) return launch_rows_of<T, kHeads, 2>(args, multiprocessors, shared_limit, stream);
  return launch_rows_of<T, kHeads, 4>(args, multiprocessors, shared_limit, stream);
}

template <class T>
cudaError_t Launch<T>::rows(const Arguments& args, int multiprocessors, int shared_limit, cudaStream_t stream) {
  if (args.heads <= 8) return launch_rows_for<T, 8>(args, multiprocessors, shared_limit, stream);
  if (args.heads <= 12) return launch_rows_for<T, 12>(args, multiprocessors, shared_limit, stream);
  return launch_rows_for<T, 16>(args, multiprocessors, shared_limit, stream);
}

}  // namespace vitkernels::head_mixing::cuda
