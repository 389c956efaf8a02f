// The CUDA kernels in float32.
#include "cascaded_group/cuda_kernels.cuh"

template struct vitkernels::cascaded_group::cuda::Launch<float>;
