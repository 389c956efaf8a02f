// Norm, 1x1 expansion, depthwise convolution, 1x1 projection and residual of a few rows of the map at a time, so that what lies between them stays in the cache.
//
// Tokens are the rows of A and channels the lanes, as they lie in a channels_last map: nothing is transposed.
#pragma once

#include "bottleneck/kernels.h"
#include "bottleneck/panels.h"
#include "common/activation.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace bottleneck;

// Tokens that go through the layers together: a panel of weights in the L1 cache is used for so many, and two buffers of them are in the L2 cache.
constexpr int64_t kTokens = 64;
// Outputs of the depthwise convolution that are summed together, in registers.
constexpr int kDepthwisePixels = kBlockRows >= 8 ? 8 : 4;

template <class T>
inline Vec<T> activate(Vec<T> v, Activation activation) {
  switch (activation) {
    case Activation::kNone: return v;
    case Activation::kRelu: return relu(v);
    case Activation::kSilu: return silu<T>(v);
    case Activation::kGelu: return gelu(v);
    case Activation::kGeluTanh: return gelu_tanh<T>(v);
    case Activation::kQuickGelu: return quick_gelu<T>(v);
  }
  return v;
}

// count vectors, `stride` apart, in place.
template <class T>
void activate_pixels(T* values, int64_t count, int64_t stride, Activation activation) {
  const auto each = [&](const auto& function) {
    for (int64_t i = 0; i < count; ++i) store(values + i * stride, function(load(values + i * stride)));
  };
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kRelu: return each([](Vec<T> v) { return relu(v); });
    case Activation::kSilu: return each([](Vec<T> v) { return silu<T>(v); });
    case Activation::kGelu: return each([](Vec<T> v) { return gelu(v); });
    case Activation::kGeluTanh: return each([](Vec<T> v) { return gelu_tanh<T>(v); });
    case Activation::kQuickGelu: return each([](Vec<T> v) { return quick_gelu<T>(v); });
  }
}

// One vector of channels of a row of outputs. rows[kh] begins at the first tap, and pixels are kPanel apart.
template <int kKernel, int kStride, class T>
__attribute__((noinline)) void depthwise_row(
    const T* const* rows, int64_t kernel, int64_t stride, const T* weight, int64_t weight_row, Vec<T> start, int64_t width, T* out, int64_t out_row) {
  const auto pixels = [&]<int kCount>(int64_t column) __attribute__((always_inline)) {
    Vec<T> acc[kCount];
    for (int j = 0; j < kCount; ++j) acc[j] = start;
    if constexpr (kKernel > 0) {
      // Each pixel is read once for all the outputs that it is a tap of.
#pragma GCC unroll 8
      for (int kh = 0; kh < kKernel; ++kh) {
        const T* source = rows[kh] + column * (kStride * kPanel);
        Vec<T> factors[kKernel];
#pragma GCC unroll 8
        for (int kw = 0; kw < kKernel; ++kw) factors[kw] = load(weight + (kh * kKernel + kw) * weight_row);
#pragma GCC unroll 32
        for (int i = 0; i < (kCount - 1) * kStride + kKernel; ++i) {
          const Vec<T> pixel = load(source + i * kPanel);
#pragma GCC unroll 8
          for (int kw = 0; kw < kKernel; ++kw) {
            const int j = (i - kw) / kStride;
            if (i >= kw && (i - kw) % kStride == 0 && j < kCount) acc[j] += factors[kw] * pixel;
          }
        }
      }
    } else {
      for (int64_t kh = 0; kh < kernel; ++kh) {
        for (int64_t kw = 0; kw < kernel; ++kw) {
          const T* source = rows[kh] + (column * stride + kw) * kPanel;
          const Vec<T> factor = load(weight + (kh * kernel + kw) * weight_row);
          for (int j = 0; j < kCount; ++j) acc[j] += factor * load(source + j * stride * kPanel);
        }
      }
    }
    for (int j = 0; j < kCount; ++j) store(out + (column + j) * out_row, acc[j]);
  };
  // The last pixels are done together with some that were done before, to the same values.
  int64_t column = 0;
  for (; column + kDepthwisePixels <= width; column += kDepthwisePixels) pixels.template operator()<kDepthwisePixels>(column);
  if (column == width) return;
  if (width >= kDepthwisePixels && width - column > kDepthwisePixels / 2) return pixels.template operator()<kDepthwisePixels>(width - kDepthwisePixels);
  constexpr int half = kDepthwisePixels / 2;
  for (; column + half <= width; column += half) pixels.template operator()<half>(column);
  if (column == width) return;
  if (width >= half) return pixels.template operator()<half>(width - half);
  for (; column < width; ++column) pixels.template operator()<1>(column);
}

// Left: what the products' left operands are held as, T or, for weights in pairs, bfloat16.
template <class S, class Left = Arith<S>>
struct Forward {
  using T = Arith<S>;
  static constexpr int64_t lanes = kLanes<T>;

  // v is normalised to (v - mean) * inverse + shift.
  struct Normal {
    T mean, inverse, shift;
  };

  explicit Forward(const Bottleneck& arguments)
      : a(arguments),
        x(static_cast<const S*>(a.x)),
        residual(static_cast<const S*>(a.residual)),
        y(static_cast<S*>(a.y)),
        hidden_stride(left_row<Left>(a.hidden)),
        normals(a.norm == Norm::kSample ? a.batch : 0) {}

  const Bottleneck& a;
  const S *x, *residual;
  S* y;
  const int64_t hidden_stride;
  Buffer<Normal> normals;  // of each sample

  // What a token adds up to. `mean` is rounded and `rest` is what it lacks: beside the deviations of a patch of one colour even one rounding step of the mean is much.
  struct Moments {
    T mean, rest, squares;  // squares: of the distances from mean + rest
  };

  Moments token_moments(const S* token) const {
    const int64_t whole = a.in / lanes * lanes;
    Vec<T> sums{};
    for (int64_t c = 0; c < whole; c += lanes) sums += load(token + c);
    T sum = reduce_add<T>(sums);
    for (int64_t c = whole; c < a.in; ++c) sum += to_float(token[c]);
    const T mean = sum / static_cast<T>(a.in);
    Vec<T> distances{}, squares{};
    for (int64_t c = 0; c < whole; c += lanes) {
      const Vec<T> d = load(token + c) - mean;
      distances += d, squares += d * d;
    }
    T distance = reduce_add<T>(distances), total = reduce_add<T>(squares);
    for (int64_t c = whole; c < a.in; ++c) {
      const T d = to_float(token[c]) - mean;
      distance += d, total += d * d;
    }
    const T rest = distance / static_cast<T>(a.in);
    return {mean, rest, max_of(total - distance * rest, T(0))};
  }

  Normal token_normal(const S* token) const {
    const Moments m = token_moments(token);
    return normal(m.mean, m.rest, m.squares, a.in);
  }

  Normal normal(double mean, double rest, double squares, int64_t count) const {
    const T rounded = static_cast<T>(mean), inverse = static_cast<T>(1 / std::sqrt(squares / static_cast<double>(count) + a.eps));
    return {rounded, inverse, -static_cast<T>(mean - static_cast<double>(rounded) + rest) * inverse};
  }

  // The mean and variance of whole samples, joined from those of their tokens, in double.
  void find_sample_normals() {
    const int64_t tokens = a.height * a.width, parts = ceil_div(tokens, kTokens);
    Buffer<double> sums(a.batch * parts * 3);
    parallel(a.batch * parts, [&](int64_t i) {
      const int64_t first = i % parts * kTokens, count = min_of(kTokens, tokens - first);
      const S* token = x + (i / parts * tokens + first) * a.x_row;
      double mean = 0, mean_squares = 0, squares = 0;
      for (int64_t t = 0; t < count; ++t, token += a.x_row) {
        const Moments m = token_moments(token);
        const double exact = static_cast<double>(m.mean) + m.rest;
        mean += exact, mean_squares += exact * exact, squares += m.squares;
      }
      double* sum = sums + i * 3;
      sum[0] = mean, sum[1] = mean_squares, sum[2] = squares;
    });
    for (int64_t b = 0; b < a.batch; ++b) {
      double mean = 0, mean_squares = 0, squares = 0;
      for (int64_t i = b * parts; i < (b + 1) * parts; ++i) mean += sums[i * 3], mean_squares += sums[i * 3 + 1], squares += sums[i * 3 + 2];
      mean /= static_cast<double>(tokens);
      squares += static_cast<double>(a.in) * (mean_squares - static_cast<double>(tokens) * mean * mean);
      normals[b] = normal(mean, 0, max_of(squares, 0.0), tokens * a.in);
    }
  }

  // Whether input() fills its buffer.
  bool copies() const { return a.norm != Norm::kNone || a.patches || !std::is_same_v<S, Left>; }
  int64_t input_row() const { return copies() ? a.in : a.x_row; }

  // A patch, copied to `out`, which is returned.
  const S* gather(int64_t token, S* out) const {
    const Patches& p = *a.patches;
    const int64_t place = token % (a.height * a.width);
    const S* corner = static_cast<const S*>(p.image.data) + token / (a.height * a.width) * p.image.batch_stride +
                      place / a.width * p.height * p.image.height_stride + place % a.width * p.width * p.image.width_stride;
    S* to = out;
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t i = 0; i < p.height; ++i, to += p.width) {
        const S* line = corner + c * p.image.dim_stride + i * p.image.height_stride;
        if (p.image.width_stride == 1) {
          std::memcpy(to, line, static_cast<size_t>(p.width) * sizeof(S));
        } else {
          for (int64_t j = 0; j < p.width; ++j) to[j] = line[j * p.image.width_stride];
        }
      }
    }
    return out;
  }

  // Tokens [first, first + count) of all samples as left operands, normalised: their own memory where there is nothing to do, else `buffer`. They are input_row()
  // apart.
  const Left* input(int64_t first, int64_t count, Left* buffer) const {
    if constexpr (std::is_same_v<S, Left>) {
      if (!copies()) return x + first * a.x_row;
    }
    Buffer<S> patch(a.patches ? a.in : 0);
    const T *weight = static_cast<const T*>(a.norm_weight), *bias = static_cast<const T*>(a.norm_bias);
    for (int64_t t = 0; t < count; ++t) {
      const S* token = a.patches ? gather(first + t, patch) : x + (first + t) * a.x_row;
      Left* out = buffer + t * a.in;
      if (a.norm == Norm::kNone) {
        if constexpr (std::is_same_v<S, Left>) {
          std::memcpy(out, token, static_cast<size_t>(a.in) * sizeof(S));
        } else {
          upcast(token, a.in, out);
        }
        continue;
      }
      const Normal n = a.norm == Norm::kToken ? token_normal(token) : normals[(first + t) / (a.height * a.width)];
      for (int64_t c = 0; c < a.in; c += lanes) {
        const int64_t left = min_of(lanes, a.in - c);
        const auto get = [&](const auto* from) { return left == lanes ? load(from + c) : load_partial(from + c, left); };
        Vec<T> v = (get(token) - n.mean) * n.inverse + n.shift;
        if (weight) v *= get(weight);
        if (bias) v += get(bias);
        left == lanes ? store(out + c, v) : store_partial(out + c, v, left);
      }
    }
    return buffer;
  }

  // Tokens [first, first + count) of the output from their hidden values.
  void project(const Left* values, int64_t stride, int64_t first, int64_t count) const {
    S* out = y + first * a.y_row;
    const S* added = residual ? residual + first * a.y_row : nullptr;
    const auto finish = [channels = a.out, y_row = a.y_row, out, added, activation = a.out_activation](int64_t row, int64_t channel, Vec<T> v) {
      v = activate<T>(v, activation);
      const int64_t offset = row * y_row + channel, n = channels - channel;
      if (n >= lanes) {
        store(out + offset, added ? v + load(added + offset) : v);
      } else {
        store_partial(out + offset, added ? v + load_partial(added + offset, n) : v, n);
      }
    };
    times_panels(count, a.hidden, a.out, values, stride, static_cast<const Left*>(a.project_weight), static_cast<const T*>(a.project_bias), finish);
  }

  // The position in its patch of a sample's token.
  int64_t group_of(int64_t token) const { return token / a.width % a.patch_height * a.patch_width + token % a.width % a.patch_width; }
  const T* gate_of(int64_t token) const {
    const int64_t tokens = a.height * a.width;
    return static_cast<const T*>(a.gate) + (token / tokens * a.patch_height * a.patch_width + group_of(token % tokens)) * round_up(a.hidden, lanes);
  }

  // Without a depthwise convolution every token goes its own way. Each worker and each tile has three of them or more, if there are as many: then a token's result
  // does not depend on how they are shared out.
  void run_tokens() const {
    const int64_t tokens = a.batch * a.height * a.width, workers = min_of(num_threads(), max_of<int64_t>(tokens / 3, 1));
    parallel(workers, [&](int64_t worker) {
      const Range own = share(tokens, worker, workers);
      const int64_t count = own.end - own.begin, tiles = ceil_div(count, kTokens), most = ceil_div(count, max_of<int64_t>(tiles, 1));
      Buffer<Left> normed(copies() ? most * a.in : 0), hidden(a.expand_weight ? most * hidden_stride : 0);
      Buffer<const T*> gates(a.gate ? most : 0);
      for (int64_t i = 0; i < tiles; ++i) {
        const Range tile = share(count, i, tiles);
        const int64_t first = own.begin + tile.begin, rows = tile.end - tile.begin;
        const Left* values = input(first, rows, normed);
        if (!a.expand_weight) {
          project(values, input_row(), first, rows);
          continue;
        }
        for (int64_t t = 0; a.gate && t < rows; ++t) gates[t] = gate_of(first + t);
        const auto keep = [out = hidden.get(), stride = hidden_stride, activation = a.activation, gate = a.gate ? gates.get() : nullptr](int64_t row, int64_t channel, Vec<T> v) {
          v = activate<T>(v, activation);
          store(out + row * stride + channel, gate ? v * load(gate[row] + channel) : v);
        };
        times_panels(rows, a.in, a.hidden, values, input_row(), static_cast<const Left*>(a.expand_weight), static_cast<const T*>(a.expand_bias), keep);
        project(hidden, hidden_stride, first, rows);
      }
    });
  }

  // Rows of the hidden map of one image, as many as the depthwise convolution sees at a time: row r lies at slot r % slots, between columns of zeros. The channels
  // are in panels, so that a panel's few rows, just made, are still in the L1 cache when they are convolved.
  struct Rows {
    T* data;
    int64_t slots, slot_size, padding;
    T* row(int64_t panel, int64_t r) const { return data + (panel * slots + (r + slots) % slots) * slot_size; }
    T* pixel(int64_t panel, int64_t r, int64_t column) const { return row(panel, r) + (column + padding) * kPanel; }
    int64_t panel_size() const { return slots * slot_size; }
  };

  int64_t panels() const { return ceil_div(a.hidden, kPanel); }

  // Rows [begin, end) of one panel of the hidden map, from their tokens; those outside of it are zeros, as the convolution pads.
  void expand(int64_t panel, int64_t begin, int64_t end, const Rows& rows, const T* values, T* const* places) const {
    for (int64_t r = begin; r < end; ++r) {
      if (r < 0 || r >= a.height) std::memset(rows.row(panel, r), 0, static_cast<size_t>(rows.slot_size) * sizeof(T));
    }
    const int64_t tokens = (min_of(end, a.height) - max_of<int64_t>(begin, 0)) * a.width, first = panel * kPanel, channels = min_of(kPanel, a.hidden - first);
    const int64_t offset = panel * rows.panel_size();
    if (tokens <= 0) return;
    if (a.expand_weight) {
      const T *weight = static_cast<const T*>(a.expand_weight) + first * a.in, *bias = static_cast<const T*>(a.expand_bias) + first;
      const auto keep = [places, offset, activation = a.activation](int64_t row, int64_t channel, Vec<T> v) {
        store(places[row] + offset + channel, activate<T>(v, activation));
      };
      times_panels(tokens, a.in, channels, values, a.in, weight, bias, keep);
    } else {
      for (int64_t t = 0; t < tokens; ++t) std::memcpy(places[t] + offset, values + t * a.in + first, static_cast<size_t>(channels) * sizeof(T));
    }
  }

  // One row of one panel of the depthwise convolution, at its channels of out [out_width][hidden_stride].
  void depthwise(int64_t panel, int64_t out_row, const Rows& rows, const T** taps, T* out) const {
    const int64_t weight_row = round_up(a.hidden, kPanel);
    const auto run = [&]() {
      if (a.kernel == 3 && a.stride == 1) return depthwise_row<3, 1, T>;
      if (a.kernel == 3 && a.stride == 2) return depthwise_row<3, 2, T>;
      if (a.kernel == 5 && a.stride == 1) return depthwise_row<5, 1, T>;
      if (a.kernel == 5 && a.stride == 2) return depthwise_row<5, 2, T>;
      return depthwise_row<0, 0, T>;
    }();
    for (int64_t channel = panel * kPanel; channel < min_of((panel + 1) * kPanel, a.hidden); channel += lanes) {
      for (int64_t kh = 0; kh < a.kernel; ++kh) taps[kh] = rows.row(panel, out_row * a.stride - a.padding + kh) + channel % kPanel;
      const Vec<T> start = load(static_cast<const T*>(a.depthwise_bias) + channel);
      run(taps, a.kernel, a.stride, static_cast<const T*>(a.depthwise_weight) + channel, weight_row, start, a.out_width, out + channel, hidden_stride);
      activate_pixels(out + channel, a.out_width, hidden_stride, a.activation);
    }
  }

  void run_rows() const {
    const int64_t total = a.batch * a.out_height, workers = min_of(num_threads(), total);
    const int64_t step = min_of(max_of<int64_t>(1, kTokens / a.out_width), a.out_height);  // output rows at a time
    const int64_t slots = (step - 1) * a.stride + a.kernel;
    parallel(workers, [&](int64_t worker) {
      const Range part = share(total, worker, workers);
      const int64_t slot_size = (a.width + 2 * a.padding) * kPanel;
      Buffer<T> memory(panels() * slots * slot_size), convolved(step * a.out_width * hidden_stride), buffer(copies() ? slots * a.width * a.in : 0);
      Buffer<T*> places(slots * a.width);
      Buffer<const T*> taps(a.kernel);
      const Rows rows{memory, slots, slot_size, a.padding};
      for (int64_t row = 0; row < panels() * slots; ++row) {  // the columns beside the map, once for all
        std::memset(memory + row * slot_size, 0, static_cast<size_t>(a.padding * kPanel) * sizeof(T));
        std::memset(memory + (row + 1) * slot_size - a.padding * kPanel, 0, static_cast<size_t>(a.padding * kPanel) * sizeof(T));
      }
      for (int64_t row = part.begin; row < part.end;) {
        const int64_t image = row / a.out_height, offset = image * a.out_height, last = min_of(part.end, offset + a.out_height);
        int64_t ready = (row - offset) * a.stride - a.padding;  // rows of the hidden map before this one are there
        for (; row < last; row += step) {
          const int64_t here = row - offset, count = min_of(step, last - row);
          const int64_t begin = max_of(ready, here * a.stride - a.padding), end = (here + count - 1) * a.stride - a.padding + a.kernel;
          const int64_t from = max_of<int64_t>(begin, 0), tokens = max_of<int64_t>(min_of(end, a.height) - from, 0) * a.width;
          const T* values = input((image * a.height + from) * a.width, tokens, buffer);
          for (int64_t t = 0; t < tokens; ++t) places[t] = rows.pixel(0, from + t / a.width, t % a.width);
          for (int64_t panel = 0; panel < panels(); ++panel) {
            expand(panel, begin, end, rows, values, places);
            for (int64_t i = 0; i < count; ++i) depthwise(panel, here + i, rows, taps, convolved + i * a.out_width * hidden_stride);
          }
          ready = end;
          project(convolved, hidden_stride, row * a.out_width, count * a.out_width);
        }
        row = last;
      }
    });
  }
};

template <class S>
void forward(const Bottleneck& a) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (a.pairs) {
      Forward<S, BFloat16> run(a);
      if (a.norm == Norm::kSample) run.find_sample_normals();
      return run.run_tokens();
    }
  }
#endif
  Forward<S> run(a);
  if (a.norm == Norm::kSample) run.find_sample_normals();
  if (a.depthwise_weight) {
    run.run_rows();
  } else {
    run.run_tokens();
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
