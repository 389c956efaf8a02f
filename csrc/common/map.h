// A tensor as plain numbers, for files that include nothing of PyTorch.
#pragma once

#include <cstdint>

namespace vitkernels {

// A [batch, dim, height, width] tensor of any strides (in elements).
struct Map {
  void* data;
  int64_t batch_stride, dim_stride, height_stride, width_stride;
};

// Rows of heads under any strides (in elements): a [rows, heads, columns] tensor whose sequences lie one after the other, or one in which each sequence begins
// at a place of its own, see packed::Attention.
struct Rows {
  void* data;
  int64_t row_stride, head_stride, column_stride;
  int64_t image_stride = 0, line_stride = 0, height_stride = 0, width_stride = 0;
};

}  // namespace vitkernels
