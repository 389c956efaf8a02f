// Plain functions that are compiled into kernels and, as constexpr code, into host code and its tests.
#pragma once

#if defined(__CUDACC__)
#define VITKERNELS_HD __host__ __device__ constexpr
#else
#define VITKERNELS_HD constexpr
#endif
