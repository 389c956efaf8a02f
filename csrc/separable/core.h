// The core alone, forward and backward: q, k and v are given, every group is a row of scores and d rows of keys and values.
#pragma once

#include "separable/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace separable;

template <class S>
Tokens<S> line_of(const Map& map, int64_t channels, int64_t patches, int64_t sample, int64_t position) {
  S* data = static_cast<S*>(map.data) + sample * map.batch_stride + position * map.height_stride;
  return {data, channels, 1, patches, map.dim_stride, 0, map.width_stride};
}

// body(values, n, count) over the patches of one channel, a vector at a time.
template <class S, class Body>
inline void for_vectors(const Tokens<S>& line, int64_t channel, const Body& body) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const S* row = line.data + channel * line.dim_stride;
  for (int64_t n = 0; n < line.width; n += lanes) {
    const int64_t count = min_of(lanes, line.width - n);
    Vec<T> v = {};
    if (line.width_stride == 1) {
      v = count == lanes ? load(row + n) : load_partial(row + n, count);
    } else {
      for (int64_t i = 0; i < count; ++i) v[i] = to_float(row[(n + i) * line.width_stride]);
    }
    body(v, n, count);
  }
}

// A long sum in two levels: one running sum of a thousand terms would round a thousand times.
template <class T>
class LongSum {
 public:
  void add(Vec<T> v) {
    part_ += v;
    if (++terms_ == 16) {
      total_ += part_;
      part_ = Vec<T>{};
      terms_ = 0;
    }
  }
  T value() const { return reduce_add<T>(total_ + part_); }

 private:
  Vec<T> total_ = {}, part_ = {};
  int terms_ = 0;
};

// Writes a vector to a contiguous row.
template <class S>
inline void put(S* row, Vec<Arith<S>> v, int64_t count) {
  if (count == kLanes<Arith<S>>) {
    store(row, v);
  } else {
    store_partial(row, v, count);
  }
}

// softmax of one group's logits into scores[0 .. round_up(N, lanes)), zero beyond N.
template <class S>
void softmax_line(const Tokens<S>& q, Arith<S>* scores) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  T highest = -__builtin_inff();
  LongSum<T> sum;
  for_vectors(q, 0, [&](Vec<T> v, int64_t n, int64_t count) {
    store(scores + n, v);
    for (int64_t i = 0; i < count; ++i) highest = v[i] > highest || v[i] != v[i] ? v[i] : highest;
  });
  const int64_t padded = round_up(q.width, lanes);
  for (int64_t n = q.width; n < padded; ++n) scores[n] = -__builtin_inff();
  for (int64_t n = 0; n < padded; n += lanes) {
    const Vec<T> e = exp(load(scores + n) - highest);
    sum.add(e);
    store(scores + n, e);
  }
  const Vec<T> inverse = broadcast(T(1) / sum.value());
  for (int64_t n = 0; n < padded; n += lanes) store(scores + n, load(scores + n) * inverse);
}

// Channels a task takes: enough to pay for computing the group's softmax once more in each.
constexpr int64_t kCoreChannels = 64;

template <class S>
void core_forward(const CoreForward& a) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t N = a.patches, P = a.positions, blocks = max_of<int64_t>(1, ceil_div(a.dim, kCoreChannels));
  parallel(a.batch * P * blocks, [&](int64_t task) {
    const int64_t group = task / blocks, sample = group / P, position = group % P;
    const Range channels{task % blocks * kCoreChannels, min_of(a.dim, (task % blocks + 1) * kCoreChannels)};
    Buffer<T> scores(round_up(N, lanes));
    softmax_line(line_of<S>(a.q, 1, N, sample, position), static_cast<T*>(scores));
    if (channels.begin == 0) std::memcpy(static_cast<T*>(a.scores) + group * N, scores, static_cast<size_t>(N) * sizeof(T));
    const Tokens<S> k = line_of<S>(a.k, a.dim, N, sample, position), v = line_of<S>(a.v, a.dim, N, sample, position);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      LongSum<T> sum;
      for_vectors(k, c, [&](Vec<T> key, int64_t n, int64_t) { sum.add(key * load(scores + n)); });
      const T context = sum.value();
      static_cast<T*>(a.context)[group * a.dim + c] = context;
      S* out = static_cast<S*>(a.out) + ((sample * a.dim + c) * P + position) * N;
      for_vectors(v, c, [&](Vec<T> value, int64_t n, int64_t count) { put(out + n, relu(value) * context, count); });
    }
  });
}

template <class S>
void core_backward(const CoreBackward& a) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t N = a.patches, P = a.positions, padded = round_up(N, lanes);
  parallel(a.batch * P, [&](int64_t group) {
    const int64_t sample = group / P, position = group % P;
    Buffer<T> scores(padded), score_grad(padded), part(padded);  // part: the sum over the last few channels, see LongSum
    std::memcpy(scores, static_cast<const T*>(a.scores) + group * N, static_cast<size_t>(N) * sizeof(T));
    for (int64_t n = N; n < padded; ++n) scores[n] = 0;
    zero<T>(score_grad, padded);
    zero<T>(part, padded);
    const Tokens<S> grad = line_of<S>(a.grad_out, a.dim, N, sample, position);
    const Tokens<S> k = line_of<S>(a.k, a.dim, N, sample, position), v = line_of<S>(a.v, a.dim, N, sample, position);
    Buffer<T> row(padded);
    for (int64_t c = 0; c < a.dim; ++c) {
      const T context = static_cast<const T*>(a.context)[group * a.dim + c];
      const int64_t out = ((sample * a.dim + c) * P + position) * N;
      for_vectors(grad, c, [&](Vec<T> g, int64_t n, int64_t) { store(row + n, g); });
      LongSum<T> sum;
      for_vectors(v, c, [&](Vec<T> value, int64_t n, int64_t count) {
        const Vec<T> g = load(row + n);
        sum.add(g * relu(value));
        if (a.grad_v) put(static_cast<S*>(a.grad_v) + out + n, value > 0 ? g * context : Vec<T>{}, count);
      });
      const T context_grad = sum.value();
      // About the mean key, which is the context: the softmax's backward subtracts it, and where one score is nearly 1 the difference of whole sums
      // would be mostly rounding.
      if (a.grad_q) {
        for_vectors(k, c, [&](Vec<T> key, int64_t n, int64_t) { store(part + n, load(part + n) + (key - context) * context_grad); });
        if (c % 16 == 15 || c + 1 == a.dim) {
          for (int64_t n = 0; n < padded; n += lanes) store(score_grad + n, load(score_grad + n) + load(part + n));
          zero<T>(part, padded);
        }
      }
      if (a.grad_k) {
        for (int64_t n = 0; n < N; n += lanes) put(static_cast<S*>(a.grad_k) + out + n, load(scores + n) * context_grad, min_of(lanes, N - n));
      }
    }
    if (!a.grad_q) return;
    // What is left to subtract is the rounding of the context, the same for all n.
    LongSum<T> rest;
    for (int64_t n = 0; n < padded; n += lanes) rest.add(load(scores + n) * load(score_grad + n));
    const T offset = rest.value();
    for (int64_t n = 0; n < N; n += lanes) {
      put(static_cast<S*>(a.grad_q) + group * N + n, load(scores + n) * (load(score_grad + n) - offset), min_of(lanes, N - n));
    }
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
