// Cumulative lengths of packed sequences at an op's entry. Python checks them with full messages where it can read them; here they guard memory, also under
// torch.compile.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace vitkernels {

// The values of a contiguous int32 tensor of `count` elements.
inline const int32_t* int32_values(const torch::stable::Tensor& tensor, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.dim() == 1 && tensor.size(0) == count && tensor.is_contiguous(), "vitkernels::", op,
      ": ", name, " must be contiguous int32 of ", count, " elements");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

// From 0, not decreasing, not beyond `rows`.
inline void check_cumulative(const int32_t* cu, int64_t sequences, int64_t rows, const char* op, const char* name) {
  STD_TORCH_CHECK(cu[0] == 0, "vitkernels::", op, ": ", name, " starts at ", cu[0], "; it must start at 0");
  for (int64_t s = 0; s < sequences; ++s) {
    STD_TORCH_CHECK(cu[s] <= cu[s + 1], "vitkernels::", op, ": ", name, " falls from ", cu[s], " to ", cu[s + 1], " at ", s + 1, "; it must not decrease");
  }
  STD_TORCH_CHECK(cu[sequences] <= rows, "vitkernels::", op, ": ", name, " ends at ", cu[sequences], "; it must not go beyond the ", rows, " rows");
}

// Of each sequence as many rows as it has, at most; `used` null: all.
inline void check_used(const int32_t* used, const int32_t* cu, int64_t sequences, const char* op, const char* name) {
  for (int64_t s = 0; used && s < sequences; ++s) {
    const int64_t length = cu[s + 1] - cu[s];
    STD_TORCH_CHECK(used[s] >= 0 && used[s] <= length, "vitkernels::", op, ": ", name, "[", s, "] must be between 0 and ", length);
  }
}

}  // namespace vitkernels
