// Norm, 1x1 expansion, depthwise convolution, 1x1 projection and residual of a few rows of the map at a time, so that what lies between them stays in the cache.
//
// Tokens are the rows of A and channels the lanes, as they lie in a channels_last map: nothing is transposed.
#pragma once

#include "bottleneck/kernels.h"
#include "common/activation.h"
#include "common/gemm.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace bottleneck;

// Tokens that go through the layers together: a panel of weights in the L1 cache is used for so many, and two buffers of them are in the L2 cache.
constexpr int64_t kTokens = 64;

template <class T>
inline Vec<T> activate(Vec<T> v, Activation activation) {
  switch (activation) {
    case Activation::kNone: return v;
    case Activation::kRelu: return relu(v);
    case Activation::kSilu: return silu<T>(v);
    case Activation::kGelu: return gelu(v);
  }
  return v;
}

// body(row, first channel, acc + bias) over whole vectors: tokens [rows][depth] times panels.
template <class T, class Body>
void times_panels(int64_t rows, int64_t depth, int64_t channels, const T* a, int64_t a_row, const T* panels, const T* bias, const Body& body) {
  const auto columns = [&]<int kVectors>(int64_t channel) {
    const T* panel = panels + channel / kPanel * kPanel * depth + channel % kPanel;
    Vec<T> start[kVectors];
    for (int j = 0; j < kVectors; ++j) start[j] = load(bias + channel + j * kLanes<T>);
    const auto block = [&]<int kRows>(int64_t row) {
      Block<kRows, kVectors, T> acc;
      sum_in_parts<kRows, kVectors, T>(depth, a + row * a_row, a_row, panel, kPanel, acc);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) body(row + i, channel + j * kLanes<T>, acc[i][j] + start[j]);
      }
    };
    for_row_blocks(
        rows, [&](int64_t row) { block.template operator()<kBlockRows>(row); }, [&](int64_t row) { block.template operator()<2>(row); },
        [&](int64_t row) { block.template operator()<1>(row); });
  };
  constexpr int64_t pair = 2 * kLanes<T>;
  int64_t channel = 0;
  for (; channel + kLanes<T> < channels; channel += pair) columns.template operator()<2>(channel);
  if (channel < channels) columns.template operator()<1>(channel);
}

template <class S>
struct Forward {
  using T = Arith<S>;
  static constexpr int64_t lanes = kLanes<T>;

  explicit Forward(const Bottleneck& arguments)
      : a(arguments),
        x(static_cast<const S*>(a.x)),
        residual(static_cast<const S*>(a.residual)),
        y(static_cast<S*>(a.y)),
        hidden_stride(round_up(a.hidden, lanes)),
        moments(a.norm == Norm::kSample ? a.batch * 2 : 0) {}

  const Bottleneck& a;
  const S *x, *residual;
  S* y;
  const int64_t hidden_stride;
  Buffer<T> moments;  // mean and 1 / standard deviation of each sample

  // Mean of a token, and the sum of the squared distances from it.
  std::pair<T, T> token_moments(const S* token) const {
    const int64_t whole = a.in / lanes * lanes;
    Vec<T> sums{};
    for (int64_t c = 0; c < whole; c += lanes) sums += load(token + c);
    T sum = reduce_add<T>(sums);
    for (int64_t c = whole; c < a.in; ++c) sum += to_float(token[c]);
    const T mean = sum / static_cast<T>(a.in);
    Vec<T> squares{};
    for (int64_t c = 0; c < whole; c += lanes) {
      const Vec<T> d = load(token + c) - mean;
      squares += d * d;
    }
    T total = reduce_add<T>(squares);
    for (int64_t c = whole; c < a.in; ++c) total += (to_float(token[c]) - mean) * (to_float(token[c]) - mean);
    return {mean, total};
  }

  T inverse_deviation(double squares, int64_t count) const { return static_cast<T>(1 / std::sqrt(squares / static_cast<double>(count) + a.eps)); }

  // The mean and variance of whole samples, joined from those of their tokens, in double.
  void find_sample_moments() {
    const int64_t tokens = a.height * a.width, parts = ceil_div(tokens, kTokens);
    Buffer<double> sums(a.batch * parts * 3);
    parallel(a.batch * parts, [&](int64_t i) {
      const int64_t first = i % parts * kTokens, count = min_of(kTokens, tokens - first);
      const S* token = x + (i / parts * tokens + first) * a.in;
      double mean = 0, mean_squares = 0, squares = 0;
      for (int64_t t = 0; t < count; ++t, token += a.in) {
        const auto [m, s] = token_moments(token);
        mean += m, mean_squares += static_cast<double>(m) * m, squares += s;
      }
      double* sum = sums + i * 3;
      sum[0] = mean, sum[1] = mean_squares, sum[2] = squares;
    });
    for (int64_t b = 0; b < a.batch; ++b) {
      double mean = 0, mean_squares = 0, squares = 0;
      for (int64_t i = b * parts; i < (b + 1) * parts; ++i) mean += sums[i * 3], mean_squares += sums[i * 3 + 1], squares += sums[i * 3 + 2];
      mean /= static_cast<double>(tokens);
      squares += static_cast<double>(a.in) * (mean_squares - static_cast<double>(tokens) * mean * mean);
      moments[b * 2] = static_cast<T>(mean), moments[b * 2 + 1] = inverse_deviation(max_of(squares, 0.0), tokens * a.in);
    }
  }

  // Tokens [first, first + count) of all samples in the arithmetic type, normalised: their own memory where there is nothing to do, else `buffer`.
  const T* input(int64_t first, int64_t count, T* buffer) const {
    if constexpr (std::is_same_v<S, T>) {
      if (a.norm == Norm::kNone) return x + first * a.in;
    }
    if (a.norm == Norm::kNone) {
      upcast(x + first * a.in, count * a.in, buffer);
      return buffer;
    }
    const T *weight = static_cast<const T*>(a.norm_weight), *bias = static_cast<const T*>(a.norm_bias);
    for (int64_t t = 0; t < count; ++t) {
      const S* token = x + (first + t) * a.in;
      T* out = buffer + t * a.in;
      T mean, inverse;
      if (a.norm == Norm::kToken) {
        const auto [m, squares] = token_moments(token);
        mean = m, inverse = inverse_deviation(squares, a.in);
      } else {
        const T* of_sample = moments + (first + t) / (a.height * a.width) * 2;
        mean = of_sample[0], inverse = of_sample[1];
      }
      for (int64_t c = 0; c < a.in; c += lanes) {
        const int64_t n = min_of(lanes, a.in - c);
        const auto get = [&](const auto* from) { return n == lanes ? load(from + c) : load_partial(from + c, n); };
        Vec<T> v = (get(token) - mean) * inverse;
        if (weight) v *= get(weight);
        if (bias) v += get(bias);
        n == lanes ? store(out + c, v) : store_partial(out + c, v, n);
      }
    }
    return buffer;
  }

  // Tokens [first, first + count) of the output from their hidden values.
  void project(const T* values, int64_t stride, int64_t first, int64_t count) const {
    const auto finish = [&](int64_t row, int64_t channel, Vec<T> v) {
      v = activate<T>(v, a.out_activation);
      const int64_t offset = (first + row) * a.out + channel, n = a.out - channel;
      if (n >= lanes) {
        store(y + offset, residual ? v + load(residual + offset) : v);
      } else {
        store_partial(y + offset, residual ? v + load_partial(residual + offset, n) : v, n);
      }
    };
    times_panels<T>(count, a.hidden, a.out, values, stride, static_cast<const T*>(a.project_weight), static_cast<const T*>(a.project_bias), finish);
  }

  // The position in its patch of a sample's token.
  int64_t group_of(int64_t token) const { return token / a.width % a.patch_height * a.patch_width + token % a.width % a.patch_width; }
  const T* gate_of(int64_t token) const {
    const int64_t tokens = a.height * a.width;
    return static_cast<const T*>(a.gate) + (token / tokens * a.patch_height * a.patch_width + group_of(token % tokens)) * round_up(a.hidden, lanes);
  }

  // Without a depthwise convolution every token goes its own way.
  void run_tokens() const {
    const int64_t tokens = a.batch * a.height * a.width;
    const int64_t blocks = ceil_div(tokens, kBlockRows), workers = min_of(num_threads(), blocks);
    parallel(workers, [&](int64_t worker) {
      const Range own = share(blocks, worker, workers);
      const int64_t begin = own.begin * kBlockRows, end = min_of(own.end * kBlockRows, tokens);
      const int64_t tile = round_up(ceil_div(end - begin, ceil_div(end - begin, kTokens)), kBlockRows);  // as many tokens in each
      Buffer<T> normed(tile * a.in), hidden(a.expand_weight ? tile * hidden_stride : 0);
      Buffer<const T*> gates(a.gate ? tile : 0);
      for (int64_t first = begin; first < end; first += tile) {
        const int64_t count = min_of(tile, end - first);
        const T* values = input(first, count, normed);
        if (!a.expand_weight) {
          project(values, a.in, first, count);
          continue;
        }
        for (int64_t t = 0; a.gate && t < count; ++t) gates[t] = gate_of(first + t);
        const auto keep = [&](int64_t row, int64_t channel, Vec<T> v) {
          v = activate<T>(v, a.activation);
          store(hidden + row * hidden_stride + channel, a.gate ? v * load(gates[row] + channel) : v);
        };
        times_panels<T>(count, a.in, a.hidden, values, a.in, static_cast<const T*>(a.expand_weight), static_cast<const T*>(a.expand_bias), keep);
        project(hidden, hidden_stride, first, count);
      }
    });
  }

  // Rows of the hidden map of one image, as many as the depthwise convolution sees at a time: row r lies at slot r % slots, between columns of zeros.
  struct Rows {
    T* data;
    int64_t slots, slot_size, stride, padding;
    T* row(int64_t r) const { return data + (r + slots) % slots * slot_size; }
    T* pixel(int64_t r, int64_t column) const { return row(r) + (column + padding) * stride; }
  };

  // Rows [begin, end) of the hidden map; those outside of it are zeros, as the convolution pads.
  void expand(int64_t image, int64_t begin, int64_t end, const Rows& rows, T* buffer, T** places) const {
    for (int64_t r = begin; r < end; ++r) {
      if (r < 0 || r >= a.height) std::memset(rows.row(r), 0, static_cast<size_t>(rows.slot_size) * sizeof(T));
    }
    begin = max_of<int64_t>(begin, 0), end = min_of(end, a.height);
    const int64_t tokens = (end - begin) * a.width, first = (image * a.height + begin) * a.width;
    for (int64_t start = 0; start < tokens; start += kTokens) {
      const int64_t count = min_of(kTokens, tokens - start);
      const T* values = input(first + start, count, buffer);
      for (int64_t t = 0; t < count; ++t) places[t] = rows.pixel(begin + (start + t) / a.width, (start + t) % a.width);
      if (a.expand_weight) {
        const auto keep = [&](int64_t row, int64_t channel, Vec<T> v) { store(places[row] + channel, activate<T>(v, a.activation)); };
        times_panels<T>(count, a.in, a.hidden, values, a.in, static_cast<const T*>(a.expand_weight), static_cast<const T*>(a.expand_bias), keep);
      } else {
        for (int64_t t = 0; t < count; ++t) std::memcpy(places[t], values + t * a.in, static_cast<size_t>(a.in) * sizeof(T));
      }
    }
  }

  // One row of the depthwise convolution, [out_width][hidden_stride]: eight pixels at a time, for which each weight is read once.
  void depthwise(int64_t out_row, const Rows& rows, T* out) const {
    const T *weight = static_cast<const T*>(a.depthwise_weight), *bias = static_cast<const T*>(a.depthwise_bias);
    const int64_t weight_stride = round_up(a.hidden, kPanel), step = a.stride * hidden_stride;
    const auto pixels = [&]<int kCount>(int64_t channel, int64_t column) {
      Vec<T> acc[kCount];
      const Vec<T> start = load(bias + channel);
      for (int j = 0; j < kCount; ++j) acc[j] = start;
      for (int64_t kh = 0; kh < a.kernel; ++kh) {
        const T* source = rows.row(out_row * a.stride - a.padding + kh) + column * step + channel;
        const T* w = weight + kh * a.kernel * weight_stride + channel;
        for (int64_t kw = 0; kw < a.kernel; ++kw, source += hidden_stride, w += weight_stride) {
          const Vec<T> factor = load(w);
#pragma GCC unroll 8
          for (int j = 0; j < kCount; ++j) acc[j] += factor * load(source + j * step);
        }
      }
      for (int j = 0; j < kCount; ++j) store(out + (column + j) * hidden_stride + channel, activate<T>(acc[j], a.activation));
    };
    for (int64_t channel = 0; channel < a.hidden; channel += lanes) {
      int64_t column = 0;
      for (; column + 8 <= a.out_width; column += 8) pixels.template operator()<8>(channel, column);
      for (; column + 2 <= a.out_width; column += 2) pixels.template operator()<2>(channel, column);
      for (; column < a.out_width; ++column) pixels.template operator()<1>(channel, column);
    }
  }

  void run_rows() const {
    const int64_t total = a.batch * a.out_height, workers = min_of(num_threads(), total);
    const int64_t step = min_of(max_of<int64_t>(1, kTokens / 2 / a.out_width), a.out_height);  // output rows at a time
    const int64_t slots = (step - 1) * a.stride + a.kernel;
    parallel(workers, [&](int64_t worker) {
      const Range part = share(total, worker, workers);
      const int64_t slot_size = (a.width + 2 * a.padding) * hidden_stride;
      Buffer<T> memory(slots * slot_size), convolved(step * a.out_width * hidden_stride), buffer(kTokens * a.in);
      Buffer<T*> places(kTokens);
      const Rows rows{memory, slots, slot_size, hidden_stride, a.padding};
      std::memset(memory, 0, static_cast<size_t>(slots * slot_size) * sizeof(T));  // the columns beside the map, once for all
      for (int64_t row = part.begin; row < part.end;) {
        const int64_t image = row / a.out_height, offset = image * a.out_height, last = min_of(part.end, offset + a.out_height);
        int64_t ready = (row - offset) * a.stride - a.padding;  // rows of the hidden map before this one are there
        for (; row < last; row += step) {
          const int64_t here = row - offset, count = min_of(step, last - row);
          const int64_t needed = (here + count - 1) * a.stride - a.padding + a.kernel;
          expand(image, max_of(ready, here * a.stride - a.padding), needed, rows, buffer, places);
          ready = needed;
          for (int64_t i = 0; i < count; ++i) depthwise(here + i, rows, convolved + i * a.out_width * hidden_stride);
          project(convolved, hidden_stride, row * a.out_width, count * a.out_width);
        }
        row = last;
      }
    });
  }
};

template <class S>
void forward(const Bottleneck& a) {
  Forward<S> run(a);
  if (a.norm == Norm::kSample) run.find_sample_moments();
  if (a.depthwise_weight) {
    run.run_rows();
  } else {
    run.run_tokens();
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
