// A tensor as plain numbers, for files that include nothing of PyTorch.
#pragma once

#include <cstdint>

namespace vitkernels {

// A [batch, dim, height, width] tensor of any strides (in elements).
struct Map {
  void* data;
  int64_t batch_stride, dim_stride, height_stride, width_stride;
};

// A [rows, heads, columns] tensor of any strides (in elements).
struct Rows {
  void* data;
  int64_t row_stride, head_stride, column_stride;
};

}  // namespace vitkernels
