// Batch normalisation with an activation behind it, in training, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vitkernels::batch_norm {

enum class Activation { kNone, kRelu, kSilu };

// A map [batch, channels, pixels], contiguous, or with the channels innermost (channels_last): then x, y and the gradients are [batch, pixels, channels].
struct Norm {
  Dtype dtype;
  int64_t batch, channels, pixels;
  bool channels_last;
  Activation activation;
  double eps;
  const void* x;
  const void *weight, *bias;  // [channels], in the accumulation type as all statistics
};

struct Forward : Norm {
  void* y;
  void *mean, *var;  // [channels], the biased variance
};

struct Backward : Norm {
  const void* grad_y;
  const void *mean, *var;
  void* grad_x;  // null: not wanted
  void *grad_weight, *grad_bias;
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

}  // namespace vitkernels::batch_norm

// Each instruction set's table, defined by batch_norm/cpu.cpp compiled for it.
namespace vitkernels::baseline { const batch_norm::Kernels& batch_norm_kernels(); }
namespace vitkernels::avx2 { const batch_norm::Kernels& batch_norm_kernels(); }
namespace vitkernels::avx512 { const batch_norm::Kernels& batch_norm_kernels(); }
namespace vitkernels::avx512_bf16 { const batch_norm::Kernels& batch_norm_kernels(); }
