// A transformer layer's attention in inference: group norm, separable self-attention and residual, on a map in channels_last.
//
// Tokens are the rows of A here: with the weights in panels this is an inverted bottleneck whose hidden values are multiplied by the context of their group.
#pragma once

#include "bottleneck/forward.h"
#include "separable/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Tokens whose weighted sum is one part, whatever the number of threads.
constexpr int64_t kPoolTokens = 128;

template <class S, class Left>
class LayerForward {
  using T = Arith<S>;
  using Normal = typename Forward<S, Left>::Normal;
  static constexpr int64_t lanes = kLanes<T>;

 public:
  explicit LayerForward(const separable::Layer& arguments)
      : a_(arguments), query_(static_cast<const T*>(a_.query)), query_bias_(*static_cast<const T*>(a_.query_bias)), tokens_(a_.height * a_.width),
        groups_(a_.patch_height * a_.patch_width), dim_(round_up(a_.in, lanes)), part_(round_up(groups_ * 2, lanes) + groups_ * dim_) {}

  // The context of each group, for a block that knows its normals.
  void find_gate(const Forward<S, Left>& block, T* gate) const {
    const int64_t parts = ceil_div(tokens_, kPoolTokens);
    Buffer<T> memory(a_.batch * parts * part_), pooled(a_.batch * groups_ * a_.in);
    parallel(a_.batch * parts, [&](int64_t i) { pool(block, i / parts, i % parts * kPoolTokens, memory + i * part_); });
    for (int64_t b = 0; b < a_.batch; ++b) join(block, b, memory + b * parts * part_, parts, pooled + b * groups_ * a_.in);
    const T *panels = static_cast<const T*>(a_.key_weight), *bias = static_cast<const T*>(a_.key_bias);
    const int64_t rows = a_.batch * groups_, columns = ceil_div(a_.in, kPanel), workers = rows * a_.in * a_.in < kForkWork ? 1 : min_of(num_threads(), columns);
    parallel(workers, [&](int64_t worker) {
      const Range own = share(columns, worker, workers);
      const int64_t first = own.begin * kPanel;
      const auto keep = [out = gate + first, stride = dim_](int64_t row, int64_t channel, Vec<T> v) { store(out + row * stride + channel, v); };
      times_panels(rows, a_.in, min_of(own.end * kPanel, a_.in) - first, pooled.get(), a_.in, panels + first * a_.in, bias + first, keep);
    });
  }

 private:
  // Below so many multiply-adds a fork and join costs more than it saves.
  static constexpr int64_t kForkWork = 1 << 20;

  // A part of the memory holds of each group the largest logit, the sum of the exponentials, and the sum of the tokens' distances from the mean weighted by them.
  T* sums(T* part) const { return part + round_up(groups_ * 2, lanes); }

  void pool(const Forward<S, Left>& block, int64_t sample, int64_t first, T* part) const {
    const int64_t count = min_of(kPoolTokens, tokens_ - first);
    const S* x = block.x + (sample * tokens_ + first) * a_.in;
    const Normal normal = block.normals[sample];
    T *largest = part, *total = part + groups_;
    for (int64_t g = 0; g < groups_; ++g) largest[g] = -__builtin_inff(), total[g] = 0;
    std::memset(sums(part), 0, static_cast<size_t>(groups_ * dim_) * sizeof(T));
    T weights[round_up(kPoolTokens, lanes)] = {};
    int64_t group[kPoolTokens];
    for (int64_t t = 0; t < count; ++t) {
      weights[t] = logit(x + t * a_.in, normal) + query_bias_;
      group[t] = block.group_of(first + t);
      largest[group[t]] = weights[t] <= largest[group[t]] ? largest[group[t]] : weights[t];  // the logit, if it is NaN
    }
    for (int64_t t = 0; t < count; ++t) weights[t] -= largest[group[t]];
    for (int64_t t = 0; t < count; t += lanes) store(weights + t, exp(load(weights + t)));
    for (int64_t t = 0; t < count; ++t) {
      const S* token = x + t * a_.in;
      T* sum = sums(part) + group[t] * dim_;
      total[group[t]] += weights[t];
      for_vectors(token, [&](int64_t c, Vec<T> v) { store(sum + c, load(sum + c) + weights[t] * (v - normal.mean)); });
    }
  }

  T logit(const S* token, const Normal& normal) const {
    Vec<T> acc[4] = {};
    int64_t j = 0;
    for_vectors(token, [&](int64_t c, Vec<T> v) { acc[j++ % 4] += ((v - normal.mean) * normal.inverse + normal.shift) * load(query_ + c); });
    return reduce_add<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }

  // body(channel, vector) over a token; lanes beyond its channels are zero.
  template <class Body>
  void for_vectors(const S* token, const Body& body) const {
    int64_t c = 0;
    for (; c + lanes <= a_.in; c += lanes) body(c, load(token + c));
    if (c < a_.in) body(c, load_partial(token + c, a_.in - c));
  }

  // The weighted mean of each group's normalised tokens: the weights' sum is one, so it is the normalised mean.
  void join(const Forward<S, Left>& block, int64_t sample, T* memory, int64_t parts, T* pooled) const {
    const Normal normal = block.normals[sample];
    const T *weight = static_cast<const T*>(a_.norm_weight), *bias = static_cast<const T*>(a_.norm_bias);
    for (int64_t g = 0; g < groups_; ++g) {
      T largest = memory[g];
      for (int64_t p = 1; p < parts; ++p) largest = memory[p * part_ + g] <= largest ? largest : memory[p * part_ + g];
      T total = 0;
      T* out = sums(memory) + g * dim_;
      for (int64_t p = 0; p < parts; ++p) {
        T* part = memory + p * part_;
        const T factor = part[groups_ + g] == 0 ? T(0) : exp(broadcast(part[g] - largest))[0];  // the part may lack the group
        const T* sum = sums(part) + g * dim_;
        total += part[groups_ + g] * factor;
        for (int64_t c = 0; c < dim_; c += lanes) store(out + c, p == 0 ? load(sum + c) * factor : load(out + c) + load(sum + c) * factor);
      }
      for (int64_t c = 0; c < a_.in; ++c) {
        const T normed = out[c] / total * normal.inverse + normal.shift;
        pooled[g * a_.in + c] = (weight ? normed * weight[c] : normed) + (bias ? bias[c] : T(0));
      }
    }
  }

  const separable::Layer& a_;
  const T* query_;
  const T query_bias_;
  const int64_t tokens_, groups_, dim_, part_;
};

template <class S, class Left>
void run_layer(const separable::Layer& a) {
  using T = Arith<S>;
  Buffer<T> gate(a.batch * a.patch_height * a.patch_width * round_up(a.in, kLanes<T>));
  separable::Layer gated = a;
  gated.gate = gate.get();
  Forward<S, Left> run(gated);
  run.find_sample_normals();
  LayerForward<S, Left>(gated).find_gate(run, gate);
  run.run_tokens();
}

template <class S>
void layer_forward(const separable::Layer& a) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (a.pairs) return run_layer<S, BFloat16>(a);
  }
#endif
  run_layer<S, Arith<S>>(a);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
