// The cascaded-group family's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::cascaded_group {

// A weight [heads, rows, columns] of any strides (in elements); heads is 1 for the projection.
struct Matrix {
  const void* data;
  int64_t head_stride, row_stride, column_stride;
};

// What every direction needs. Biases are null where there are none; all but x and the matrices are contiguous.
struct Attention {
  Dtype dtype;
  int64_t batch, channels, height, width;
  int64_t heads, key_dim, value_dim, window;
  const int64_t* kernel_sizes;  // one per head
  double scale;
  Map x;
  Matrix qkv_weight;           // [heads, 2 * key_dim + value_dim, channels / heads]
  const void* qkv_bias;        // [heads, 2 * key_dim + value_dim]
  const void* dw_weight;       // head after head, [key_dim, k, k]
  const void* dw_bias;         // [heads, key_dim]
  const void* attention_bias;  // [heads, window * window]
  Matrix proj_weight;          // [channels, heads * value_dim]
};

struct Forward : Attention {
  const void* proj_bias;  // [channels]
  Map y;
  bool add;  // to what y holds, which may be x itself: each window is read before it is written
};

// Gradients: contiguous, in the shapes of what they belong to. grad_x.data null: not wanted; the others all null: not wanted.
struct Gradients {
  Map x;
  void *qkv_weight, *qkv_bias, *dw_weight, *dw_bias, *attention_bias, *proj_weight, *proj_bias;
};

struct Backward : Attention {
  Map grad_y;
  Gradients grad;
};

// With live BatchNorm: weights as they are, no biases, and for every convolution the norm's weight and bias and this batch's mean and (biased) variance, in the
// accumulation type.
struct Norm {
  const void *gamma, *beta;
  void *mean, *var;
};
struct Norms {
  Norm qkv, dw, proj;  // [heads, 2 * key_dim + value_dim], [heads, key_dim], [channels]
  double eps;
};

// Per head the mean of its input's channels and their covariance: [heads, 1 + split, split], split = channels / heads.
struct NormForward : Attention {
  Norms norms;
  Map y;
  void *projected;  // [windows * window * window, channels], the projection before its norm
  void *moments;
};

struct NormBackward : Attention {
  Norms norms;
  Map grad_y;
  const void *projected, *moments;
  Gradients grad;  // its biases are null
  void *grad_qkv_gamma, *grad_qkv_beta, *grad_dw_gamma, *grad_dw_beta, *grad_proj_gamma, *grad_proj_beta;  // in the accumulation type
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*norm_forward)(const NormForward&);
  void (*norm_backward)(const NormBackward&);
};

}  // namespace vitkernels::cascaded_group

// Each instruction set's table, defined by cascaded_group/cpu.cpp compiled for it.
namespace vitkernels::baseline { const cascaded_group::Kernels& cascaded_group_kernels(); }
namespace vitkernels::avx2 { const cascaded_group::Kernels& cascaded_group_kernels(); }
namespace vitkernels::avx512 { const cascaded_group::Kernels& cascaded_group_kernels(); }
namespace vitkernels::avx512_bf16 { const cascaded_group::Kernels& cascaded_group_kernels(); }
