// The inverted bottleneck's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::bottleneck {

enum class Activation : int64_t { kNone, kRelu, kSilu, kGelu, kGeluTanh, kQuickGelu };
constexpr int64_t kLastActivation = static_cast<int64_t>(Activation::kQuickGelu);
// Of what a norm takes its mean and variance: the channels of a token (LayerNorm), or everything of a sample (GroupNorm with one group).
enum class Norm : int64_t { kNone, kToken, kSample };

// Output channels of a weight panel: the kernels read [panels][depth][kPanel], zeros where there is no channel.
constexpr int64_t kPanel = 32;

// Tokens that are the patches of an image [batch, channels, ..], each [channels][height][width] as a convolution's weight has them.
struct Patches {
  Map image;
  int64_t channels, height, width;
};

// x [batch, height, width, in], y [batch, out_height, out_width, out], dense but for the distance of their tokens. All weights and biases are of the arithmetic type; biases and the depthwise
// weight are padded with zeros to whole panels.
struct Bottleneck {
  Dtype dtype;
  int64_t batch, height, width, in, hidden, out;
  const void* x;
  const Patches* patches;  // in the place of x, without a depthwise convolution; null: none
  int64_t x_row, y_row;  // elements from a token to the next one, of x, and of y and the residual; in and out but for tokens that go without a depthwise convolution
  Norm norm;
  double eps;
  const void *norm_weight, *norm_bias;        // [in]; null: ones, zeros
  const void *expand_weight, *expand_bias;    // panels of depth in; null: no expansion, hidden is in
  const void *depthwise_weight, *depthwise_bias;  // [kernel * kernel][padded hidden]; null: none
  int64_t kernel, stride, padding, out_height, out_width;
  const void *project_weight, *project_bias;  // panels of depth hidden
  Activation activation, out_activation;      // behind the expansion and the depthwise convolution; behind the projection
  const void* residual;                       // like y; null: none
  // Without a depthwise convolution: factors of the activated hidden values, of the arithmetic type, [batch][patch_height * patch_width][hidden in whole vectors],
  // one row for each position of a pixel in its patch; null: none.
  const void* gate;
  int64_t patch_height, patch_width;
  void* y;
  // Whether the weights, but not the biases, are bfloat16, as pairs: [panels][depth / 2][kPanel][2], of even depths. Only for bfloat16 without a depthwise
  // convolution, and with kernels that say so.
  bool pairs;
};

struct Kernels {
  void (*forward)(const Bottleneck&);
  bool pairs;  // bfloat16 products of pairs are there
};

}  // namespace vitkernels::bottleneck

// Each instruction set's table, defined by bottleneck/cpu.cpp compiled for it.
namespace vitkernels::baseline { const bottleneck::Kernels& bottleneck_kernels(); }
namespace vitkernels::avx2 { const bottleneck::Kernels& bottleneck_kernels(); }
namespace vitkernels::avx512 { const bottleneck::Kernels& bottleneck_kernels(); }
namespace vitkernels::avx512_bf16 { const bottleneck::Kernels& bottleneck_kernels(); }
