// The CUDA kernels in bfloat16.
#include "cascaded_group/cuda_kernels.cuh"

template struct vitkernels::cascaded_group::cuda::Launch<vitkernels::BFloat16>;
