// Element types that kernels read and write. 16-bit types are storage only: arithmetic is float.
#pragma once

#include <cstdint>

namespace vitkernels {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace vitkernels

// The body of a function of arguments `a`: returns function<S>(a) for the storage type S that a.dtype names.
#define VITKERNELS_FOR_DTYPE(function)                                               \
  switch (a.dtype) {                                                                 \
    case ::vitkernels::Dtype::kFloat64: return function<double>(a);                  \
    case ::vitkernels::Dtype::kFloat32: return function<float>(a);                   \
    case ::vitkernels::Dtype::kBFloat16: return function<::vitkernels::BFloat16>(a); \
    case ::vitkernels::Dtype::kFloat16: return function<::vitkernels::Float16>(a);   \
  }
