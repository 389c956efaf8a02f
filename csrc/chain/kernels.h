// Chains of layers of a convolutional network, one table of kernels per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "bottleneck/kernels.h"
#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::chain {

// The last one is no kind of a program's: a first convolution of so few channels that these are no vector.
enum class Kind : int64_t { kConvolution, kDepthwise, kFeedForward, kSqueezeExcite, kAttention, kPool, kImage };

// One layer, from a map [height, width, channels] to [out_height, out_width, out_channels]. A pixel's channels are neighbours in memory, `row` elements from
// one pixel to the next.
struct Layer {
  Kind kind;
  int64_t channels, height, width, row;
  int64_t out_channels, out_height, out_width, out_row;
  bool residual;                    // the input is added to the result
  bool relu;                        // of a convolution or a depthwise one, before that
  int64_t kernel, stride, padding;  // likewise
  int64_t hidden;                   // channels inside a feed-forward layer or a squeeze-and-excitation
  int64_t heads, key_dim, value_dim, window;  // of a cascaded group attention
  const int64_t* kernel_sizes;                // one per head
  int64_t matrices[2], vectors[7];  // where its weights begin, in the order in which vitkernels/ops/chain/op.py packs them
};

// Channels of a pixel and pieces of `vectors` are padded to a multiple of this, for whole vectors of every instruction set.
constexpr int64_t kAlign = 16;
// A matrix [depth, columns] lies in panels as the weights of a bottleneck do.
using bottleneck::kPanel;

struct Chain {
  Dtype dtype;  // of x, y and the matrices
  int64_t batch;
  Map x, y;
  const void *matrices, *vectors;  // the vectors are in the accumulation type
  // Whether the matrices are pairs, [panels][depth / 2][kPanel][2], odd depths filled up with zeros. Only of bfloat16, and with kernels that say so.
  bool pairs;
  const Layer* layers;
  int64_t count;
};

struct Kernels {
  void (*run)(const Chain&);
  bool pairs;  // bfloat16 products of pairs are there
};

}  // namespace vitkernels::chain

// Each instruction set's table, defined by chain/cpu.cpp compiled for it.
namespace vitkernels::baseline { const chain::Kernels& chain_kernels(); }
namespace vitkernels::avx2 { const chain::Kernels& chain_kernels(); }
namespace vitkernels::avx512 { const chain::Kernels& chain_kernels(); }
namespace vitkernels::avx512_bf16 { const chain::Kernels& chain_kernels(); }
