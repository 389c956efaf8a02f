// The CUDA kernels of Re-Attention in float16.
#include "head_mixing/cuda_kernels.cuh"

template struct vitkernels::head_mixing::cuda::Launch<vitkernels::Float16>;
