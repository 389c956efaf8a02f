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
