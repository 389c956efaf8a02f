// Maps in channels_last: a pixel's channels are neighbours, and lanes are channels. Blocks of pixels are summed apart, then joined in their order.
#pragma once

#include "batch_norm/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kLeastPixels = 64;  // of a block, however many channels: what is kept of it, 16 bytes a channel, is little beside it

// The pixels of a map in blocks.
template <class S>
struct Blocks {
  using T = Arith<S>;
  int64_t rows, channels, width, block, count;

  explicit Blocks(const Norm& a)
      : rows(a.batch * a.pixels),
        channels(a.channels),
        width(round_up(a.channels, kLanes<T>)),
        block(max_of<int64_t>(kBlockBytes / (width * static_cast<int64_t>(sizeof(T))), kLeastPixels)),
        count(ceil_div(rows, block)) {}

  Range range(int64_t i) const { return {i * block, min_of((i + 1) * block, rows)}; }
  int64_t elements() const { return rows * channels; }
};

template <class T>
inline void clear(T* p, int64_t count) { std::memset(p, 0, static_cast<size_t>(count) * sizeof(T)); }

// kSums rows of sums over the pixels of a block: body(i, c, add), add(k, value) for each sum k of the vector at channel c of pixel i.
template <class T, int kSums, class Body>
inline void sum_rows(Range rows, int64_t channels, int64_t width, double* sums, const Body& body) {
  Buffer<T> part(kSums * width);
  clear(sums, kSums * width);
  for (int64_t first = rows.begin; first < rows.end; first += kSumLength) {
    clear(part.get(), kSums * width);
    const int64_t end = min_of(first + kSumLength, rows.end);
    for (int64_t i = first; i < end; ++i) {
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        body(i, c, [&](int sum, Vec<T> value) {
          T* at = part + sum * width + c;
          store(at, load(at) + value);
        });
      }
    }
    for (int64_t c = 0; c < kSums * width; c += kLanes<T>) add_to<T>(sums + c, load(part + c));
  }
}

template <class S>
void block_moments(const Blocks<S>& blocks, const S* x, Range rows, double* means, double* squares) {
  using T = Arith<S>;
  const int64_t channels = blocks.channels, width = blocks.width;
  const auto value = [&](int64_t i, int64_t c) { return load_row(x + i * channels + c, channels - c); };
  sum_rows<T, 1>(rows, channels, width, means, [&](int64_t i, int64_t c, const auto& add) { add(0, value(i, c)); });
  Buffer<T> mean(width);
  for (int64_t c = 0; c < width; ++c) {
    means[c] /= static_cast<double>(rows.end - rows.begin);
    mean[c] = static_cast<T>(means[c]);
  }
  sum_rows<T, 1>(rows, channels, width, squares, [&](int64_t i, int64_t c, const auto& add) {
    const Vec<T> apart = value(i, c) - load(mean + c);
    add(0, apart * apart);
  });
}

// The deviations of each block are from its own mean, so nothing cancels, however far from 0 the values are.
template <class S>
void find_moments(const Forward& a, const Blocks<S>& blocks) {
  using T = Arith<S>;
  const int64_t width = blocks.width;
  Buffer<double> found(blocks.count * 2 * width);
  shared_out(blocks.count, blocks.elements(), [&](int64_t i) {
    double* mean = found + i * 2 * width;
    block_moments<S>(blocks, static_cast<const S*>(a.x), blocks.range(i), mean, mean + width);
  });
  Buffer<double> joined(2 * width);
  double *mean = joined.get(), *squares = mean + width;
  clear(mean, 2 * width);
  const auto for_blocks = [&](const auto& body) {
    for (int64_t i = 0; i < blocks.count; ++i) body(static_cast<double>(blocks.range(i).end - blocks.range(i).begin), found + i * 2 * width);
  };
  for_blocks([&](double pixels, const double* of) {
    for (int64_t c = 0; c < a.channels; ++c) mean[c] += pixels * of[c];
  });
  const double count = static_cast<double>(blocks.rows);
  for (int64_t c = 0; c < a.channels; ++c) mean[c] /= count;
  for_blocks([&](double pixels, const double* of) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const double apart = of[c] - mean[c];
      squares[c] += of[width + c] + pixels * apart * apart;
    }
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    static_cast<T*>(a.mean)[c] = static_cast<T>(mean[c]);
    static_cast<T*>(a.var)[c] = static_cast<T>(squares[c] / count);
  }
}

// The affine maps of all channels, as rows of whole vectors.
template <class T>
struct Channels {
  const Buffer<T> memory;
  T *mean, *scale, *bias;

  Channels(const Norm& a, const T* from_mean, const T* from_var, int64_t width)
      : memory(3 * width), mean(memory.get()), scale(mean + width), bias(scale + width) {
    clear(mean, 3 * width);
    for (int64_t c = 0; c < a.channels; ++c) {
      mean[c] = from_mean[c];
      scale[c] = static_cast<const T*>(a.weight)[c] * inverse_deviation(from_var[c], a.eps);
      bias[c] = static_cast<const T*>(a.bias)[c];
    }
  }
  Affine<T, Vec<T>> at(int64_t c) const { return {load(mean + c), load(scale + c), load(bias + c)}; }
};

template <class S, Activation kActivation>
void forward_rows(const Forward& a) {
  using T = Arith<S>;
  const Blocks<S> blocks(a);
  find_moments<S>(a, blocks);
  const Channels<T> channels(a, static_cast<const T*>(a.mean), static_cast<const T*>(a.var), blocks.width);
  shared_out(blocks.count, blocks.elements(), [&](int64_t block) {
    const Range rows = blocks.range(block);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const S* x = static_cast<const S*>(a.x) + i * a.channels;
      S* y = static_cast<S*>(a.y) + i * a.channels;
      for (int64_t c = 0; c < a.channels; c += kLanes<T>) {
        store_row(y + c, activate<kActivation, T>(channels.at(c)(load_row(x + c, a.channels - c))), a.channels - c);
      }
    }
  });
}

template <class S, Activation kActivation>
void backward_rows(const Backward& a) {
  using T = Arith<S>;
  const Blocks<S> blocks(a);
  const int64_t width = blocks.width;
  const T* var = static_cast<const T*>(a.var);
  const Channels<T> channels(a, static_cast<const T*>(a.mean), var, width);
  const auto grad_of = [&](int64_t at, int64_t c, Vec<T> x) {
    return times_slope<kActivation, T>(load_row(static_cast<const S*>(a.grad_y) + at + c, a.channels - c), channels.at(c)(x));
  };
  Buffer<double> found(blocks.count * 2 * width);
  shared_out(blocks.count, blocks.elements(), [&](int64_t block) {
    sum_rows<T, 2>(blocks.range(block), a.channels, width, found + block * 2 * width, [&](int64_t i, int64_t c, const auto& add) {
      const Vec<T> x = load_row(static_cast<const S*>(a.x) + i * a.channels + c, a.channels - c), grad = grad_of(i * a.channels, c, x);
      add(0, grad);
      add(1, grad * (x - load(channels.mean + c)));
      if (kKeepsSlope<kActivation> && a.grad_x) store_row(static_cast<S*>(a.grad_x) + i * a.channels + c, grad, a.channels - c);
    });
  });
  Buffer<double> joined(2 * width);
  clear(joined.get(), 2 * width);
  for (int64_t i = 0; i < blocks.count; ++i) {
    for (int64_t c = 0; c < 2 * width; ++c) joined[c] += found[i * 2 * width + c];
  }
  Buffer<T> through(2 * width);
  clear(through.get(), 2 * width);
  for (int64_t c = 0; c < a.channels; ++c) {
    const double grads = joined[c], products = joined[width + c];
    const double inverse = inverse_deviation(var[c], a.eps), count = static_cast<double>(blocks.rows);
    static_cast<T*>(a.grad_bias)[c] = static_cast<T>(grads);
    static_cast<T*>(a.grad_weight)[c] = static_cast<T>(products * inverse);
    through[c] = static_cast<T>(grads / count);
    through[width + c] = static_cast<T>(products * inverse * inverse / count);
  }
  if (!a.grad_x) return;
  shared_out(blocks.count, blocks.elements(), [&](int64_t block) {
    const Range rows = blocks.range(block);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      S* grad_x = static_cast<S*>(a.grad_x) + i * a.channels;
      for (int64_t c = 0; c < a.channels; c += kLanes<T>) {
        const Vec<T> x = load_row(static_cast<const S*>(a.x) + i * a.channels + c, a.channels - c);
        const Vec<T> grad = kKeepsSlope<kActivation> ? load_row(grad_x + c, a.channels - c) : grad_of(i * a.channels, c, x);
        const Vec<T> rest = grad - load(through + c) - (x - load(channels.mean + c)) * load(through + width + c);
        store_row(grad_x + c, rest * load(channels.scale + c), a.channels - c);
      }
    }
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
