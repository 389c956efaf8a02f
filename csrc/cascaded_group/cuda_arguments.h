// The arguments of the CUDA kernels, plain data for both sides of a launch.
#pragma once

#include "cascaded_group/schedule.h"
#include "common/map.h"

namespace vitkernels::cascaded_group::cuda {

// The op's weights, dense, as in vitkernels/ops/cascaded_group/op.py: Packed. A missing bias is null.
struct Weights {
  const void *qkv, *qkv_bias, *dw, *dw_bias, *table, *proj, *proj_bias;
  bool qkv_paired, proj_paired;  // rows of qkv, and each head's part of a row of proj, may be read two neighbours at a time
};

struct ForwardArguments {
  Shape shape;
  ForwardLayout layout;
  Map x, y;
  Weights weights;
  float scale;
  char* workspace;  // layout.workspace_bytes for each block of the grid
};

struct BackwardArguments {
  Shape shape;
  BackwardLayout layout;
  GradientOffsets offsets;
  Map grad_y, x, grad_x;
  Weights weights;
  float scale;
  bool need_x, need_weights;
  float* partial;   // offsets.total for each block of the grid
  char* workspace;  // layout.workspace_bytes for each block of the grid
};

// Where the gradients of the weights go, in the order of GradientOffsets.
struct WeightGradients {
  static constexpr int kCount = 7;
  void* data[kCount];
  int64_t end[kCount];
};

}  // namespace vitkernels::cascaded_group::cuda
