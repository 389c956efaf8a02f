// How threads share out passes without a depthwise convolution: the tokens or, of few, the outputs of each layer.
#pragma once

#include <algorithm>

#include "bottleneck/kernels.h"
#include "common/parallel.h"

namespace vitkernels::bottleneck {

// Of an element, of tokens and packed weights.
struct Bytes {
  int64_t tokens, matrices, vectors;
};

inline int64_t padded(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel; }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// body(first, count) for every thread's share of `total`, of `least` or more, if there are as many.
template <class Body>
void for_shares(int64_t total, int64_t least, const Body& body) {
  struct Context {
    int64_t total, workers;
    const Body& body;
  } context{total, std::min(num_threads(), std::max<int64_t>(total / least, 1)), body};
  const auto run = [](void* data, int64_t i) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t first = c.total * i / c.workers;
    c.body(first, c.total * (i + 1) / c.workers - first);
  };
  parallel_for(context.workers, run, &context);
}

// Tokens with that many neighbours have the same result whatever the number of threads.
constexpr int64_t kLeastTokens = 3;

// One pass of tokens [first, first + count); x, y and residual are those of all tokens.
void run_pass(Bottleneck a, int64_t first, int64_t count, int64_t bytes, const char* x, char* y, const char* residual = nullptr);

// The two layers of an MLP, whose hidden tokens are `row` elements apart.
Bottleneck expansion_of(Bottleneck mlp, int64_t row);
Bottleneck reduction_of(Bottleneck mlp, int64_t row);

// The distance of hidden tokens: an odd number of cache lines, or the rows of a tile would fall into few sets of the L1 cache.
int64_t hidden_row(int64_t hidden, int64_t bytes);

// Whether threads share out the outputs of each layer instead of the tokens, of layers of which the narrowest has so many outputs, and that read so many bytes of
// matrices. Of few tokens each thread has few, and would read all of the matrices for these, from beyond its own cache; on the other hand threads meet behind every
// layer then. Hidden tokens are kept as the matrices are.
bool shares_outputs(int64_t tokens, int64_t narrowest, int64_t matrices, Bytes bytes);

// A layer's outputs from `first` on, which begins a panel.
Bottleneck columns_of(Bottleneck a, int64_t first, int64_t count, Bytes bytes);

// One layer of all tokens, its outputs shared out.
void run_by_outputs(const Bottleneck& a, int64_t tokens, Bytes bytes, const char* x, char* y, const char* residual = nullptr);

}  // namespace vitkernels::bottleneck
