// Cascaded group attention with live BatchNorm. The statistics of a convolution are sums over all windows, so a head is a few passes over the windows
// instead of one; between them the activations of all windows lie token-major in memory.
//
// The qkv convolution's output y = W f is never formed to be measured: with mu and Cov the mean and covariance of f, mean(y) = W mu and var(y) = diag(W Cov W^T). With
// s = gamma / sigma, q | k | v = s W (f - mu) + beta is an affine map of f, and what its backward needs of the statistics is a sum over windows too:
// from G = sum dy (f - mu)^T follow dW, dgamma and the gradient M = 2/T sum_o dvar_o W_o W_o^T of the covariance, which reaches f as M (f - mu).
#pragma once

#include <cmath>
#include <vector>

#include "cascaded_group/backward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Count, mean and sum of squared distances from it, per channel, in double; merged by Chan's formula, which does not cancel.
class Moments {
 public:
  static int64_t size(int64_t channels) { return 2 * channels; }
  Moments(double* memory, int64_t channels) : mean_(memory), m2_(memory + channels), channels_(channels) { std::memset(memory, 0, sizeof(double) * 2 * channels); }
  // `mean` and `m2` of `count` more values.
  template <class Mean, class M2>
  void merge(double count, const Mean& mean, const M2& m2) {
    const double total = count_ + count;
    if (count == 0) return;
    for (int64_t c = 0; c < channels_; ++c) {
      const double delta = static_cast<double>(mean(c)) - mean_[c];
      mean_[c] += delta * count / total;
      m2_[c] += static_cast<double>(m2(c)) + delta * delta * count_ * count / total;
    }
    count_ = total;
  }
  void merge(const Moments& other) {
    merge(other.count_, [&](int64_t c) { return other.mean_[c]; }, [&](int64_t c) { return other.m2_[c]; });
  }
  double mean(int64_t c) const { return mean_[c]; }
  double var(int64_t c) const { return m2_[c] / count_; }

 private:
  double *mean_, *m2_;
  int64_t channels_;
  double count_ = 0;
};

// The moments of a window's [N] rows, merged into `total`; `memory` holds two rows.
template <class T>
inline void add_moments(int64_t tokens, const T* rows, int64_t row, int64_t columns, T* memory, Moments& total) {
  constexpr int64_t lanes = kLanes<T>;
  T *mean = memory, *m2 = memory + columns;
  for (int64_t c = 0; c < columns; c += lanes) {
    Vec<T> sum = {}, squares = {};
    for (int64_t n = 0; n < tokens; ++n) sum += load(rows + n * row + c);
    const Vec<T> average = sum / static_cast<T>(tokens);
    for (int64_t n = 0; n < tokens; ++n) {
      const Vec<T> distance = load(rows + n * row + c) - average;
      squares += distance * distance;
    }
    store(mean + c, average);
    store(m2 + c, squares);
  }
  total.merge(static_cast<double>(tokens), [&](int64_t c) { return mean[c]; }, [&](int64_t c) { return m2[c]; });
}

constexpr int64_t kTokens = 16;  // summed in T before double takes over

// sums[c] += sum_n value(n, c), a vector at a time; a few tokens in T, then double.
template <class T, class Value>
inline void add_double(int64_t tokens, int64_t columns, double* sums, const Value& value) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < columns; c += lanes) {
    for (int64_t first = 0; first < tokens; first += kTokens) {
      Vec<T> sum = {};
      for (int64_t n = first; n < min_of(first + kTokens, tokens); ++n) sum += value(n, c);
      for (int64_t i = 0; i < lanes; ++i) sums[c + i] += static_cast<double>(sum[i]);
    }
  }
}

// sums[c] += the column sums of [N] rows.
template <class T>
inline void add_columns_double(int64_t tokens, const T* rows, int64_t row, int64_t columns, double* sums) {
  add_double<T>(tokens, columns, sums, [&](int64_t n, int64_t c) { return load(rows + n * row + c); });
}

// The same of products with normalised values (values - mean) * inverse.
template <class T>
inline void add_products_double(
    int64_t tokens, const T* rows, int64_t row, const T* values, int64_t values_row, const T* mean, const T* inverse, int64_t columns, double* sums) {
  add_double<T>(tokens, columns, sums, [&](int64_t n, int64_t c) {
    return load(rows + n * row + c) * ((load(values + n * values_row + c) - load(mean + c)) * load(inverse + c));
  });
}

// One normalised convolution of one head, padded like its output: y -> (y - mean) * factor + beta with factor = gamma * inverse. Not y * factor + shift: the
// rounding of a shift is one that all tokens share, and statistics further on see it.
template <class T>
struct NormRow {
  T *mean, *inverse, *factor, *beta;

  static int64_t size(int64_t row) { return 4 * row; }
  Vec<T> apply(int64_t c, Vec<T> y) const { return (y - load(mean + c)) * load(factor + c) + load(beta + c); }
  NormRow(T* memory, int64_t row) : mean(memory), inverse(mean + row), factor(inverse + row), beta(factor + row) {
    std::memset(memory, 0, static_cast<size_t>(size(row)) * sizeof(T));
  }
  void set(int64_t column, T gamma, T offset, T average, T variance, double eps) const {
    const T root = std::sqrt(variance + static_cast<T>(eps));
    mean[column] = average;
    inverse[column] = T(1) / root;
    factor[column] = gamma / root;
    beta[column] = offset;
  }
};

// What both directions share: the raw weights, the activations of all windows, a head with its norm folded in.
template <class T>
struct NormPass {
  static constexpr int64_t lanes = kLanes<T>;

  const Attention& a;
  const Norms& norms;
  const Layout<T>& l;
  const Weights<T>& weights;  // packed with a scale of 1: the norm of the depthwise convolution sees its plain output
  const int64_t workers;

  int64_t all_tokens() const { return l.windows * l.tokens; }
  int64_t qkv_rows() const { return 2 * l.key_dim + l.value_dim; }
  // The column of output row o of a head, in the padded order q | k | v.
  int64_t column(int64_t o) const {
    return o < l.key_dim ? o : o < 2 * l.key_dim ? l.key_row + o - l.key_dim : 2 * l.key_row + o - 2 * l.key_dim;
  }

  static T at(const void* data, int64_t i) { return static_cast<const T*>(data)[i]; }
  // From the head's first channel on; betas may be missing where only gradients are wanted.
  void set(const NormRow<T>& row, const Norm& norm, int64_t first, int64_t count, bool qkv) const {
    for (int64_t o = 0; o < count; ++o) {
      const T beta = norm.beta ? at(norm.beta, first + o) : T(0);
      row.set(qkv ? column(o) : o, at(norm.gamma, first + o), beta, at(norm.mean, first + o), at(norm.var, first + o), norms.eps);
    }
  }
  void set_qkv(const NormRow<T>& row, int64_t head) const { set(row, norms.qkv, head * qkv_rows(), qkv_rows(), true); }
  void set_dw(const NormRow<T>& row, int64_t head) const { set(row, norms.dw, head * l.key_dim, l.key_dim, false); }
  void set_proj(const NormRow<T>& row) const { set(row, norms.proj, 0, l.channels, false); }

  // The head with its qkv norm, for an input about its mean: s (W (f - mu)) + beta. s is not multiplied into W: a rounded weight would be an error that all
  // tokens share.
  HeadWeights<T> normed(int64_t head, const NormRow<T>& norm) const {
    HeadWeights<T> w = weights.head(head);
    w.qkv_factor = norm.factor;
    w.qkv_bias = norm.beta;
    return w;
  }

  // The norm of the depthwise convolution and the scale of the scores, on one vector of its output.
  Vec<T> finish_q(const NormRow<T>& norm, int64_t vector, Vec<T> acc) const {
    const int64_t c = vector * lanes;
    return norm.apply(c, acc) * static_cast<T>(a.scale);
  }

  // body(worker, range of windows)
  template <class Body>
  void by_worker(const Body& body) const {
    parallel(workers, [&](int64_t worker) { body(worker, share(l.windows, worker, workers)); });
  }

  // sums[0 .. size) += what the other workers have, in their order.
  void add_doubles(double* sums, int64_t size) const {
    for (int64_t w = 1; w < workers; ++w) {
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[w * size + i];
    }
  }

  // target[n] = source[n] - mean for the tokens of a window; the two may be the same.
  void centre(const T* source, int64_t source_row, const T* mean, T* target, int64_t target_row) const {
    for (int64_t n = 0; n < l.tokens; ++n) {
      for (int64_t c = 0; c < l.split_row; c += lanes) store(target + n * target_row + c, load(source + n * source_row + c) - load(mean + c));
    }
  }
};

template <class T>
struct NormForwardPass : NormPass<T> {
  using Base = NormPass<T>;
  using Base::a, Base::l, Base::lanes, Base::norms, Base::weights, Base::workers;
  const NormForward& args;

  // mu and Cov of a head's input, from the sums of its channels: [1 + split][split], in double, because an error in a variance is one that all tokens share.
  // From here on f is about its mean.
  void measure_input(int64_t head, T* f, int64_t f_row, const double* sums, double* moments) const {
    const double count = static_cast<double>(this->all_tokens());
    const int64_t size = l.split * l.split_row;
    Buffer<T> mean(l.split_row);
    for (int64_t c = 0; c < l.split; ++c) moments[c] = sums[c] / count;
    for (int64_t c = 0; c < l.split_row; ++c) mean[c] = c < l.split ? static_cast<T>(moments[c]) : T(0);
    Buffer<double> totals(workers * size);
    this->by_worker([&](int64_t worker, Range range) {
      double* total = totals + worker * size;
      std::memset(total, 0, sizeof(double) * static_cast<size_t>(size));
      Buffer<T> gram(size);
      for (int64_t window = range.begin; window < range.end; ++window) {
        T* rows = f + window * l.tokens * f_row;
        this->centre(rows, f_row, mean, rows, f_row);
        for (int64_t first = 0; first < l.tokens; first += kTokens) {
          const T* part = rows + first * f_row;
          gemm<T>(l.split, min_of(kTokens, l.tokens - first), l.split_row / lanes, part, 1, f_row, part, f_row,
                  [&](int64_t row, int64_t vector, Vec<T> acc) { store(gram + row * l.split_row + vector * lanes, acc); });
          for (int64_t i = 0; i < size; ++i) total[i] += static_cast<double>(gram[i]);
        }
      }
    });
    this->add_doubles(totals, size);
    T* saved = static_cast<T*>(args.moments) + head * (1 + l.split) * l.split;
    for (int64_t r = 0; r < l.split; ++r) {
      for (int64_t c = 0; c < l.split; ++c) {
        // About the rounded mean the sums are not quite the covariance.
        const double off = (static_cast<double>(mean[r]) - moments[r]) * (static_cast<double>(mean[c]) - moments[c]);
        moments[(1 + r) * l.split + c] = totals[r * l.split_row + c] / count - off;
      }
    }
    for (int64_t i = 0; i < (1 + l.split) * l.split; ++i) saved[i] = static_cast<T>(moments[i]);
  }

  // mean = W mu, var = diag(W Cov W^T).
  void measure_qkv(int64_t head, const double* moments) const {
    const Panel<T> w = weights.head(head).qkv;  // [split][q | k | v]
    const double* covariance = moments + l.split;
    Buffer<double> wide(l.split * l.qkv_row), mean(l.qkv_row), product(l.qkv_row), var(l.qkv_row);
    for (int64_t j = 0; j < l.qkv_row; ++j) mean[j] = var[j] = 0;
    for (int64_t c = 0; c < l.split; ++c) {
      for (int64_t j = 0; j < l.qkv_row; ++j) {
        wide[c * l.qkv_row + j] = static_cast<double>(w.data[c * w.row + j]);
        mean[j] += wide[c * l.qkv_row + j] * moments[c];
      }
    }
    for (int64_t r = 0; r < l.split; ++r) {
      for (int64_t j = 0; j < l.qkv_row; ++j) product[j] = 0;
      for (int64_t c = 0; c < l.split; ++c) {
        const double entry = covariance[r * l.split + c];
        for (int64_t j = 0; j < l.qkv_row; ++j) product[j] += entry * wide[c * l.qkv_row + j];
      }
      for (int64_t j = 0; j < l.qkv_row; ++j) var[j] += product[j] * wide[r * l.qkv_row + j];
    }
    T *mean_out = static_cast<T*>(norms.qkv.mean) + head * this->qkv_rows(), *var_out = static_cast<T*>(norms.qkv.var) + head * this->qkv_rows();
    for (int64_t o = 0; o < this->qkv_rows(); ++o) {
      mean_out[o] = static_cast<T>(mean[this->column(o)]);
      const double variance = var[this->column(o)];
      var_out[o] = static_cast<T>(variance < 0 ? 0.0 : variance);  // and NaN stays NaN
    }
  }

  void write_moments(Moments* parts, int64_t channels, const Norm& norm, int64_t first) const {
    for (int64_t w = 1; w < workers; ++w) parts[0].merge(parts[w]);
    for (int64_t c = 0; c < channels; ++c) {
      static_cast<T*>(norm.mean)[first + c] = static_cast<T>(parts[0].mean(c));
      static_cast<T*>(norm.var)[first + c] = static_cast<T>(parts[0].var(c));
    }
  }

  void run() const {
    const int64_t N = l.tokens, all = this->all_tokens();
    Buffer<T> x(all * l.x_row), f(all * l.split_row), convolved(all * l.key_row), cat(all * l.cat_row);
    Buffer<double> moments((1 + l.split) * l.split);
    Buffer<T> qkv_norm_memory(NormRow<T>::size(l.qkv_row)), dw_norm_memory(NormRow<T>::size(l.key_row));
    Buffer<double> sums(workers * l.split_row), moments_memory(workers * Moments::size(max_of(l.key_row, l.channel_row)));
    const auto reset_sums = [&] { std::memset(sums.get(), 0, sizeof(double) * static_cast<size_t>(workers * l.split_row)); };

    reset_sums();
    this->by_worker([&](int64_t worker, Range range) {
      for (int64_t window = range.begin; window < range.end; ++window) {
        T* rows = x + window * N * l.x_row;
        l.io.load_window(Window(a.x, l, a.height, a.width, window), l.window, {l.heads, l.split, l.split_row, l.x_row}, rows);
        add_columns_double<T>(N, rows, l.x_row, l.split_row, sums + worker * l.split_row);
      }
    });
    for (int64_t head = 0; head < l.heads; ++head) {
      T* input = head == 0 ? x : f;
      const int64_t input_row = head == 0 ? l.x_row : l.split_row;
      this->add_doubles(sums, l.split_row);
      measure_input(head, input, input_row, sums, moments);
      measure_qkv(head, moments);
      const NormRow<T> qkv_norm(qkv_norm_memory, l.qkv_row), dw_norm(dw_norm_memory, l.key_row);
      this->set_qkv(qkv_norm, head);
      const HeadWeights<T> w = this->normed(head, qkv_norm);

      // q through its convolution, and the statistics of that.
      std::vector<Moments> parts;
      for (int64_t i = 0; i < workers; ++i) parts.emplace_back(moments_memory + i * Moments::size(l.key_row), l.key_row);
      this->by_worker([&](int64_t worker, Range range) {
        Buffer<T> grid(l.grid_size), rows(2 * l.key_row);
        std::memset(grid.get(), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
        for (int64_t window = range.begin; window < range.end; ++window) {
          T* out = convolved + window * N * l.key_row;
          project<T>(l, w, input + window * N * input_row, input_row, 0, N, 0, l.key_row / lanes, {grid, nullptr});
          convolve<T>(l, grid, w.kernel, w.dw, 0, N, [&](int64_t token, int64_t vector, Vec<T> acc) { store(out + token * l.key_row + vector * lanes, acc); });
          add_moments<T>(N, out, l.key_row, l.key_row, rows, parts[static_cast<size_t>(worker)]);
        }
      });
      write_moments(parts.data(), l.key_dim, norms.dw, head * l.key_dim);
      this->set_dw(dw_norm, head);

      // The attention, and the next head's input with the sums of its channels.
      const bool feeds = head + 1 < l.heads;
      reset_sums();
      this->by_worker([&](int64_t worker, Range range) {
        Buffer<T> kv(N * l.kv_row), q(N * l.key_row), q_transposed(l.key_row * l.token_row), scores(N * l.token_row), inverse_sum(l.token_row), next(N * l.split_row);
        for (int64_t window = range.begin; window < range.end; ++window) {
          project<T>(l, w, input + window * N * input_row, input_row, 0, N, l.key_row / lanes, l.qkv_row / lanes, {nullptr, kv});
          const T* raw = convolved + window * N * l.key_row;
          for (int64_t i = 0; i < N; ++i) {
            for (int64_t v = 0; v < l.key_row / lanes; ++v) {
              store(q + i * l.key_row + v * lanes, this->finish_q(dw_norm, v, load(raw + i * l.key_row + v * lanes)));
            }
          }
          transpose_tokens<T>(q, l.key_row, 0, N, l.key_row, q_transposed);
          attention_scores<T>(l, w, kv, l.kv_row, q_transposed, 0, N, scores, inverse_sum);
          T* outputs = cat + window * N * l.cat_row + head * l.value_row;
          const T* split = x + window * N * l.x_row + (head + 1) * l.split_row;
          T* next_f = f + window * N * l.split_row;
          gemm<T>(N, N, l.value_row / lanes, scores, 1, l.token_row, kv + l.key_row, l.kv_row, [&](int64_t row, int64_t vector, Vec<T> acc) {
            const Vec<T> out = acc * inverse_sum[row];
            store(outputs + row * l.cat_row + vector * lanes, relu(out));
            if (feeds) store(next_f + row * l.split_row + vector * lanes, out + load(split + row * l.x_row + vector * lanes));
          });
          if (feeds) add_columns_double<T>(N, next_f, l.split_row, l.split_row, sums + worker * l.split_row);
        }
      });
    }

    std::vector<Moments> parts;
    for (int64_t i = 0; i < workers; ++i) parts.emplace_back(moments_memory + i * Moments::size(l.channel_row), l.channel_row);
    T* projected = static_cast<T*>(args.projected);
    const Panel<T> proj = weights.proj();
    this->by_worker([&](int64_t worker, Range range) {
      Buffer<T> out(N * l.channel_row), rows(2 * l.channel_row);
      for (int64_t window = range.begin; window < range.end; ++window) {
        gemm<T>(N, l.cat_row, l.channel_row / lanes, cat + window * N * l.cat_row, l.cat_row, 1, proj.data, proj.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
          store(out + row * l.channel_row + vector * lanes, acc);
        });
        add_moments<T>(N, out, l.channel_row, l.channel_row, rows, parts[static_cast<size_t>(worker)]);
        for (int64_t n = 0; n < N; ++n) std::memcpy(projected + (window * N + n) * l.channels, out + n * l.channel_row, static_cast<size_t>(l.channels) * sizeof(T));
      }
    });
    write_moments(parts.data(), l.channels, norms.proj, 0);
    Buffer<T> proj_norm_memory(NormRow<T>::size(l.channel_row));
    const NormRow<T> proj_norm(proj_norm_memory, l.channel_row);
    this->set_proj(proj_norm);
    this->by_worker([&](int64_t, Range range) {
      Buffer<T> out(N * l.channel_row);
      for (int64_t window = range.begin; window < range.end; ++window) {
        for (int64_t n = 0; n < N; ++n) {
          const T* row = projected + (window * N + n) * l.channels;
          for (int64_t c = 0; c < l.channels; c += lanes) {
            const Vec<T> value = l.channels - c >= lanes ? load(row + c) : load_partial(row + c, l.channels - c);
            store(out + n * l.channel_row + c, proj_norm.apply(c, value));
          }
        }
        l.io.store_window(Window(args.y, l, a.height, a.width, window), l.window, {1, l.channels, l.channel_row, l.channel_row}, out, false);
      }
    });
  }
};

template <class T>
struct NormBackwardPass : NormPass<T> {
  using Base = NormPass<T>;
  using Base::a, Base::l, Base::lanes, Base::norms, Base::weights, Base::workers;
  const NormBackward& args;
  const BackwardWeights<T>& backward_weights;

  // BatchNorm's gradient to its input, one vector: factor * (grad - mean(grad) - normalised * mean(grad * normalised)).
  static Vec<T> through_norm(const NormRow<T>& norm, const T* mean_grad, const T* mean_product, int64_t c, Vec<T> value, Vec<T> grad) {
    const Vec<T> normalised = (value - load(norm.mean + c)) * load(norm.inverse + c);
    return load(norm.factor + c) * (grad - load(mean_grad + c) - normalised * load(mean_product + c));
  }

  // From sums (of grad, then of grad * normalised, [2][row]) the gradients of beta and gamma, and their means for through_norm.
  void finish_sums(double* sums, int64_t row, int64_t channels, void* grad_gamma, void* grad_beta, int64_t first, T* mean_grad, T* mean_product) const {
    this->add_doubles(sums, 2 * row);
    const double count = static_cast<double>(this->all_tokens());
    for (int64_t c = 0; c < row; ++c) {
      mean_grad[c] = static_cast<T>(sums[c] / count);
      mean_product[c] = static_cast<T>(sums[row + c] / count);
    }
    if (!grad_gamma) return;
    for (int64_t c = 0; c < channels; ++c) {
      static_cast<T*>(grad_beta)[first + c] = static_cast<T>(sums[c]);
      static_cast<T*>(grad_gamma)[first + c] = static_cast<T>(sums[row + c]);
    }
  }

  // y = s W (f - mu) + beta: from G = sum dy (f - mu)^T and b = sum dy the gradients of W, gamma and beta, and what the statistics make of f's:
  // (dy - mean_grad) s W + covariance_grad (f - mu). (The mean is taken off before the product, so that it need not cancel after it.)
  void through_statistics(int64_t head, const NormRow<T>& norm, T* G, const T* b, T* covariance_grad, T* mean_grad) const {
    const T* covariance = static_cast<const T*>(args.moments) + (head * (1 + l.split) + 1) * l.split;
    const Panel<T> w = weights.head(head).qkv;  // [split][q | k | v]
    const T count = static_cast<T>(this->all_tokens());
    const int64_t rows = this->qkv_rows();
    Buffer<T> product(l.split * l.qkv_row), var_grad(l.qkv_row), weighted(l.qkv_row * l.split_row);
    gemm<T>(l.split, l.split, l.qkv_row / lanes, covariance, l.split, 1, w.data, w.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      store(product + row * l.qkv_row + vector * lanes, acc);  // Cov W^T
    });
    std::memset(var_grad.get(), 0, static_cast<size_t>(l.qkv_row) * sizeof(T));
    std::memset(weighted.get(), 0, static_cast<size_t>(l.qkv_row * l.split_row) * sizeof(T));
    for (int64_t o = 0; o < rows; ++o) {
      const int64_t j = this->column(o), i = head * rows + o;
      double scale_grad = 0;
      for (int64_t c = 0; c < l.split; ++c) scale_grad += static_cast<double>(G[j * l.split_row + c]) * static_cast<double>(w.data[c * w.row + j]);
      var_grad[j] = static_cast<T>(-0.5 * scale_grad) * norm.factor[j] * norm.inverse[j] * norm.inverse[j];
      if (args.grad_qkv_gamma) {
        static_cast<T*>(args.grad_qkv_gamma)[i] = static_cast<T>(scale_grad) * norm.inverse[j];
        static_cast<T*>(args.grad_qkv_beta)[i] = b[j];
      }
      for (int64_t c = 0; c < l.split; ++c) {
        weighted[j * l.split_row + c] = 2 * var_grad[j] / count * w.data[c * w.row + j];
        G[j * l.split_row + c] = norm.factor[j] * G[j * l.split_row + c] + 2 * var_grad[j] * product[c * l.qkv_row + j];
      }
    }
    gemm<T>(l.split, l.qkv_row, l.split_row / lanes, w.data, w.row, 1, weighted.get(), l.split_row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      store(covariance_grad + row * l.split_row + vector * lanes, acc);
    });
    for (int64_t j = 0; j < l.qkv_row; ++j) mean_grad[j] = b[j] / count;
  }

  void run() const {
    const int64_t N = l.tokens, all = this->all_tokens(), taps = weights.taps();
    const bool need_weights = args.grad.qkv_weight;
    Buffer<T> f(l.heads * all * l.split_row), cat(all * l.cat_row), grad_y(all * l.channel_row), grad_qkv(all * l.qkv_row), convolved(all * l.key_row);
    Buffer<T> qkv_norm_memory(l.heads * NormRow<T>::size(l.qkv_row)), dw_norm_memory(l.heads * NormRow<T>::size(l.key_row)), proj_norm_memory(NormRow<T>::size(l.channel_row));
    std::vector<NormRow<T>> qkv_norms, dw_norms;
    std::vector<HeadWeights<T>> heads;
    for (int64_t h = 0; h < l.heads; ++h) {
      qkv_norms.emplace_back(qkv_norm_memory + h * NormRow<T>::size(l.qkv_row), l.qkv_row);
      dw_norms.emplace_back(dw_norm_memory + h * NormRow<T>::size(l.key_row), l.key_row);
      this->set_qkv(qkv_norms.back(), h);
      this->set_dw(dw_norms.back(), h);
      heads.push_back(this->normed(h, qkv_norms.back()));
    }
    const NormRow<T> proj_norm(proj_norm_memory, l.channel_row);
    this->set_proj(proj_norm);
    // Every head's input, about its mean.
    const auto input = [&](int64_t head, int64_t window) { return f + (head * all + window * N) * l.split_row; };
    Buffer<T> input_means(l.heads * l.split_row);
    for (int64_t h = 0; h < l.heads; ++h) {
      const T* moments = static_cast<const T*>(args.moments) + h * (1 + l.split) * l.split;
      for (int64_t c = 0; c < l.split_row; ++c) input_means[h * l.split_row + c] = c < l.split ? moments[c] : T(0);
    }
    const int64_t widest = max_of(l.key_row, l.channel_row);
    Buffer<double> sums(workers * 2 * widest);
    const auto reset_sums = [&] { std::memset(sums.get(), 0, sizeof(double) * static_cast<size_t>(workers * 2 * widest)); };
    Buffer<T> mean_grad(widest), mean_product(widest);

    // The forward again, now that all statistics are known, and the sums that the projection's norm needs.
    const T* projected = static_cast<const T*>(args.projected);
    reset_sums();
    this->by_worker([&](int64_t worker, Range range) {
      Buffer<T> x(N * l.x_row), state(HeadState<T>::size(l)), q_transposed(l.key_row * l.token_row), inverse_sum(l.token_row), values(N * l.channel_row);
      std::memset(state.get(), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
      std::memset(values.get(), 0, static_cast<size_t>(N * l.channel_row) * sizeof(T));
      double* own = sums + worker * 2 * l.channel_row;
      for (int64_t window = range.begin; window < range.end; ++window) {
        l.io.load_window(Window(a.x, l, a.height, a.width, window), l.window, {l.heads, l.split, l.split_row, l.x_row}, x);
        this->centre(x, l.x_row, input_means, input(0, window), l.split_row);
        for (int64_t head = 0; head < l.heads; ++head) {
          const HeadState<T> s(l, input(head, window), l.split_row, state);
          attend_again<T>(l, heads[static_cast<size_t>(head)], s, q_transposed, inverse_sum,
                          [&](int64_t, int64_t vector, Vec<T> acc) { return this->finish_q(dw_norms[static_cast<size_t>(head)], vector, acc); });
          const bool feeds = head + 1 < l.heads;
          T* next = feeds ? input(head + 1, window) : nullptr;
          T* outputs = cat + window * N * l.cat_row + head * l.value_row;
          weighted_values(l, s, [&](int64_t row, int64_t vector, Vec<T> out) {
            store(outputs + row * l.cat_row + vector * lanes, relu(out));
            const int64_t c = (head + 1) * l.split_row + vector * lanes;
            if (feeds) store(next + row * l.split_row + vector * lanes, out + load(x + row * l.x_row + c) - load(input_means + c));
          });
        }
        T* grad = grad_y + window * N * l.channel_row;
        l.io.load_window(Window(args.grad_y, l, a.height, a.width, window), l.window, {1, l.channels, l.channel_row, l.channel_row}, grad);
        for (int64_t n = 0; n < N; ++n) std::memcpy(values + n * l.channel_row, projected + (window * N + n) * l.channels, static_cast<size_t>(l.channels) * sizeof(T));
        add_columns_double<T>(N, grad, l.channel_row, l.channel_row, own);
        add_products_double<T>(N, grad, l.channel_row, values, l.channel_row, proj_norm.mean, proj_norm.inverse, l.channel_row, own + l.channel_row);
      }
    });
    finish_sums(sums, l.channel_row, l.channels, args.grad_proj_gamma, args.grad_proj_beta, 0, mean_grad, mean_product);

    // The projection. What is kept per worker of the sums over windows; the gradient of cat takes the place of cat.
    const auto long_loop = [&](Range range, const LongSums<T>& long_sums, const auto& body) {
      for (int64_t window = range.begin; window < range.end; ++window) {
        body(window);
        if ((window - range.begin) % LongSums<T>::kWindows == LongSums<T>::kWindows - 1) long_sums.empty();
      }
      long_sums.empty();
    };
    const Panel<T> proj = backward_weights.proj();
    const int64_t proj_size = l.channels * l.cat_row;
    Buffer<T> proj_totals(workers * proj_size);
    this->by_worker([&](int64_t worker, Range range) {
      const LongSums<T> long_sums(proj_totals + worker * proj_size, proj_size);
      Buffer<T> grad(N * l.channel_row);
      std::memset(grad.get(), 0, static_cast<size_t>(N * l.channel_row) * sizeof(T));
      long_loop(range, long_sums, [&](int64_t window) {
        T* outputs = cat + window * N * l.cat_row;
        for (int64_t n = 0; n < N; ++n) {
          const T *value = projected + (window * N + n) * l.channels, *incoming = grad_y + (window * N + n) * l.channel_row;
          for (int64_t c = 0; c < l.channels; c += lanes) {
            const Vec<T> v = l.channels - c >= lanes ? load(value + c) : load_partial(value + c, l.channels - c);
            store(grad + n * l.channel_row + c, through_norm(proj_norm, mean_grad, mean_product, c, v, load(incoming + c)));
          }
        }
        if (need_weights) add_outer<T>(N, grad, l.channel_row, l.channels, outputs, l.cat_row, l.cat_row, long_sums.recent());
        gemm<T>(N, l.channels, l.cat_row / lanes, grad, l.channel_row, 1, proj.data, proj.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
          T* place = outputs + row * l.cat_row + vector * lanes;
          store(place, load(place) > 0 ? acc : Vec<T>{});
        });
      });
    });
    add_workers<T>(proj_totals, proj_size, workers);

    // The heads in reverse, two passes over the windows each: to the norm of the depthwise convolution, and through it to the sums that the qkv norm needs.
    // A head's input gradient is written by the pass that needs it, the next head's first, or the last of all.
    const int64_t tap_size = taps * l.key_row, pair_size = N * l.token_row, qkv_size = l.qkv_row * l.split_row;
    const int64_t second_size = qkv_size + l.qkv_row + tap_size;
    Buffer<T> head_totals(workers * max_of(pair_size, second_size)), covariance_grad(l.split * l.split_row), qkv_mean_grad(l.qkv_row);
    Buffer<T> all_qkv(l.heads * qkv_size), all_pairs(l.heads * pair_size), all_taps(tap_size);
    Buffer<T> grad_x(args.grad.x.data ? all * l.x_row : 0);
    // Gradient of head `head`'s input, for one window: to x, and to the output of the head before.
    const auto input_gradient = [&](int64_t head, int64_t window, T* through) {
      gemm<T>(N, l.split, l.split_row / lanes, input(head, window), l.split_row, 1, covariance_grad.get(), l.split_row,
              [&](int64_t row, int64_t vector, Vec<T> acc) { store(through + row * l.split_row + vector * lanes, acc); });
      T* grads = grad_qkv + window * N * l.qkv_row;
      const T* factor = qkv_norms[static_cast<size_t>(head)].factor;
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t c = 0; c < l.qkv_row; c += lanes) {
          T* place = grads + n * l.qkv_row + c;
          store(place, (load(place) - load(qkv_mean_grad + c)) * load(factor + c));
        }
      }
      const Panel<T> back = backward_weights.qkv(head);
      gemm<T>(N, l.qkv_row, l.split_row / lanes, grads, l.qkv_row, 1, back.data, back.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
        const Vec<T> grad = acc + load(through + row * l.split_row + vector * lanes);
        if (args.grad.x.data) store(grad_x + (window * N + row) * l.x_row + head * l.split_row + vector * lanes, grad);
        if (head > 0) {
          T* place = cat + (window * N + row) * l.cat_row + (head - 1) * l.value_row + vector * lanes;
          store(place, load(place) + grad);
        }
      });
    };

    for (int64_t head = l.heads - 1; head >= 0; --head) {
      const HeadWeights<T>& w = heads[static_cast<size_t>(head)];
      const NormRow<T>&qkv_norm = qkv_norms[static_cast<size_t>(head)], &dw_norm = dw_norms[static_cast<size_t>(head)];
      reset_sums();
      this->by_worker([&](int64_t worker, Range range) {
        const LongSums<T> long_sums(head_totals + worker * pair_size, pair_size);
        Buffer<T> state(HeadState<T>::size(l)), transposed(max_of(l.key_row, l.value_row) * l.token_row), inverse_sum(l.token_row), grad_scores(N * l.token_row);
        Buffer<T> grad_grid(l.grid_size), through(N * l.split_row);
        std::memset(state.get(), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
        double* own = sums + worker * 2 * l.key_row;
        long_loop(range, long_sums, [&](int64_t window) {
          if (head + 1 < l.heads) input_gradient(head + 1, window, through);
          const HeadState<T> s(l, input(head, window), l.split_row, state);
          T* raw = convolved + window * N * l.key_row;
          attend_again<T>(l, w, s, transposed, inverse_sum, [&](int64_t token, int64_t vector, Vec<T> acc) {
            store(raw + token * l.key_row + vector * lanes, acc);
            return this->finish_q(dw_norm, vector, acc);
          });
          T* grad = grad_qkv + window * N * l.qkv_row;
          attend_backward<T>(l, s, cat + window * N * l.cat_row + head * l.value_row, l.cat_row, transposed, grad_scores, long_sums.recent(), grad, grad_grid);
          for (int64_t n = 0; n < N; ++n) {
            for (int64_t c = 0; c < l.key_row; c += lanes) store(grad + n * l.qkv_row + c, load(grad_grid + l.place(n) + c) * static_cast<T>(a.scale));
          }
          add_columns_double<T>(N, grad, l.qkv_row, l.key_row, own);
          add_products_double<T>(N, grad, l.qkv_row, raw, l.key_row, dw_norm.mean, dw_norm.inverse, l.key_row, own + l.key_row);
        });
      });
      finish_sums(sums, l.key_row, l.key_dim, args.grad_dw_gamma, args.grad_dw_beta, head * l.key_dim, mean_grad, mean_product);
      add_workers<T>(head_totals, pair_size, workers);
      std::memcpy(all_pairs + head * pair_size, head_totals.get(), static_cast<size_t>(pair_size) * sizeof(T));

      this->by_worker([&](int64_t worker, Range range) {
        const LongSums<T> long_sums(head_totals + worker * second_size, second_size);
        T *G = long_sums.recent(), *b = G + qkv_size, *tap = b + l.qkv_row;
        Buffer<T> grid(l.grid_size), grad_grid(l.grid_size);
        std::memset(grid.get(), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
        std::memset(grad_grid.get(), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
        long_loop(range, long_sums, [&](int64_t window) {
          T* grad = grad_qkv + window * N * l.qkv_row;
          const T* raw = convolved + window * N * l.key_row;
          for (int64_t n = 0; n < N; ++n) {
            for (int64_t c = 0; c < l.key_row; c += lanes) {
              store(grad_grid + l.place(n) + c, through_norm(dw_norm, mean_grad, mean_product, c, load(raw + n * l.key_row + c), load(grad + n * l.qkv_row + c)));
            }
          }
          convolve<T>(l, grad_grid, w.kernel, backward_weights.dw(head), 0, N, [&](int64_t token, int64_t vector, Vec<T> acc) {
            store(grad + token * l.qkv_row + vector * lanes, acc);
          });
          if (need_weights) {
            project<T>(l, w, input(head, window), l.split_row, 0, N, 0, l.key_row / lanes, {grid, nullptr});
            add_taps<T>(l, grid, grad_grid, w.kernel, tap + weights.taps_before(head) * l.key_row);
          }
          add_outer<T>(N, grad, l.qkv_row, l.qkv_row, input(head, window), l.split_row, l.split_row, G);
          add_columns<T>(N, grad, l.qkv_row, l.qkv_row, b);
        });
      });
      add_workers<T>(head_totals, second_size, workers);
      through_statistics(head, qkv_norm, head_totals, head_totals + qkv_size, covariance_grad, qkv_mean_grad);
      std::memcpy(all_qkv + head * qkv_size, head_totals.get(), static_cast<size_t>(qkv_size) * sizeof(T));
      const int64_t before = weights.taps_before(head) * l.key_row, own_taps = w.kernel * w.kernel * l.key_row;
      std::memcpy(all_taps + before, head_totals + qkv_size + l.qkv_row + before, static_cast<size_t>(own_taps) * sizeof(T));
    }
    if (args.grad.x.data) {
      this->by_worker([&](int64_t, Range range) {
        Buffer<T> through(N * l.split_row);
        for (int64_t window = range.begin; window < range.end; ++window) {
          input_gradient(0, window, through);
          l.io.store_window(Window(args.grad.x, l, a.height, a.width, window), l.window, {l.heads, l.split, l.split_row, l.x_row}, grad_x + window * N * l.x_row, false);
        }
      });
    }
    if (!need_weights) return;
    WeightSums<T> result;
    result.qkv = all_qkv, result.bias = all_pairs, result.dw = all_taps, result.proj = proj_totals;
    write_gradients<T>(l, weights, result, T(1), args.grad);
  }
};

// The arguments with a scale of 1, for Weights: the norm of the depthwise convolution sees its plain output.
inline Attention unscaled(Attention a) {
  a.scale = 1;
  return a;
}

template <class T>
void norm_forward(const NormForward& a) {
  const Attention plain = unscaled(a);
  const Layout<T> l(plain);
  const Weights<T> weights(plain, l, nullptr);
  const NormForwardPass<T> pass{{a, a.norms, l, weights, max_of<int64_t>(1, min_of(num_threads(), l.windows))}, a};
  pass.run();
}

template <class T>
void norm_backward(const NormBackward& a) {
  const Attention plain = unscaled(a);
  const Layout<T> l(plain);
  const Weights<T> weights(plain, l, nullptr);
  const BackwardWeights<T> backward_weights(plain, l, weights);
  const NormBackwardPass<T> pass{{a, a.norms, l, weights, max_of<int64_t>(1, min_of(num_threads(), l.windows))}, a, backward_weights};
  pass.run();
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
