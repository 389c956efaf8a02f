// The CUDA kernels of Re-Attention in bfloat16.
#include "head_mixing/cuda_kernels.cuh"

template struct vitkernels::head_mixing::cuda::Launch<vitkernels::BFloat16>;
