// Backward of cascaded group attention: a window at a time, its forward computed again, then the heads in reverse. Nothing but the arguments is saved.
#pragma once

#include "cascaded_group/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// The weights again, for products with gradients: input channels innermost, taps mirrored.
template <class T>
class BackwardWeights {
 public:
  BackwardWeights(const Attention& a, const Layout<T>& l, const Weights<T>& forward)
      : a_(a), l_(l), forward_(forward), qkv_in_place_(whole_vectors(l) && a.qkv_weight.column_stride == 1 && l.split == l.split_row),
        proj_in_place_(whole_vectors(l) && a.proj_weight.column_stride == 1), qkv_(qkv_in_place_ ? 0 : l.heads * l.qkv_row * l.split_row),
        proj_(proj_in_place_ ? 0 : l.channels * l.cat_row), dw_(forward.taps() * l.key_row) {
    if (!proj_in_place_) std::memset(proj_.get(), 0, static_cast<size_t>(l.channels * l.cat_row) * sizeof(T));
    parallel(l.heads, [&](int64_t i) {
      if (!qkv_in_place_) pack_qkv(i);
      const Matrix& m = a_.proj_weight;
      if (!proj_in_place_) {
        l_.io.pack(l_.io.at(m.data, i * l_.value_dim * m.column_stride), m.row_stride, m.column_stride, l_.channels, l_.value_dim, proj_ + i * l_.value_row, l_.cat_row);
      }
      const HeadWeights<T> head = forward_.head(i);
      const int64_t taps = head.kernel * head.kernel;
      for (int64_t tap = 0; tap < taps; ++tap) {
        std::memcpy(dw_ + (forward_.taps_before(i) + tap) * l_.key_row, head.dw + (taps - 1 - tap) * l_.key_row, static_cast<size_t>(l_.key_row) * sizeof(T));
      }
    });
  }

  // [q | k | v][split]
  Panel<T> qkv(int64_t i) const {
    if (!qkv_in_place_) return {qkv_ + i * l_.qkv_row * l_.split_row, l_.split_row};
    return {static_cast<const T*>(a_.qkv_weight.data) + i * a_.qkv_weight.head_stride, a_.qkv_weight.row_stride};
  }
  // [channels][cat_row]
  Panel<T> proj() const {
    if (proj_in_place_) return {static_cast<const T*>(a_.proj_weight.data), a_.proj_weight.row_stride};
    return {proj_, l_.cat_row};
  }
  const T* dw(int64_t i) const { return dw_ + forward_.taps_before(i) * l_.key_row; }

 private:
  void pack_qkv(int64_t i) const {
    const Matrix& m = a_.qkv_weight;
    T* target = qkv_ + i * l_.qkv_row * l_.split_row;
    std::memset(target, 0, static_cast<size_t>(l_.qkv_row * l_.split_row) * sizeof(T));
    const auto part = [&](int64_t from, int64_t rows, int64_t to) {
      l_.io.pack(l_.io.at(m.data, i * m.head_stride + from * m.row_stride), m.row_stride, m.column_stride, rows, l_.split, target + to * l_.split_row, l_.split_row);
    };
    part(0, l_.key_dim, 0);
    part(l_.key_dim, l_.key_dim, l_.key_row);
    part(2 * l_.key_dim, l_.value_dim, 2 * l_.key_row);
  }

  const Attention& a_;
  const Layout<T>& l_;
  const Weights<T>& forward_;
  const bool qkv_in_place_, proj_in_place_;
  const Buffer<T> qkv_, proj_, dw_;
};

// What one head computed for a window, kept for its backward.
template <class T>
struct HeadState {
  const T* f;  // [N] rows of f_row
  int64_t f_row;
  T *grid, *kv, *q, *scores;  // scores: the normalised attention, keys down and queries along the rows, [N][token_row]

  static int64_t size(const Layout<T>& l) { return l.grid_size + l.tokens * (l.kv_row + l.key_row + l.token_row); }
  HeadState(const Layout<T>& l, const T* input, int64_t input_row, T* memory)
      : f(input), f_row(input_row), grid(memory), kv(grid + l.grid_size), q(kv + l.tokens * l.kv_row), scores(q + l.tokens * l.key_row) {}
};

// q, k, v, the convolved and scaled q, and the attention of one head; the normalisation of q between convolution and scores is `finish_q(token, vector, acc)`.
template <class T, class FinishQ>
inline void attend_again(const Layout<T>& l, const HeadWeights<T>& w, const HeadState<T>& s, T* q_transposed, T* inverse_sum, const FinishQ& finish_q) {
  constexpr int64_t lanes = kLanes<T>;
  project<T>(l, w, s.f, s.f_row, 0, l.tokens, 0, l.qkv_row / lanes, {s.grid, s.kv});
  convolve(l, s.grid, w.kernel, w.dw, 0, l.tokens, [&](int64_t token, int64_t vector, Vec<T> acc) {
    store(s.q + token * l.key_row + vector * lanes, finish_q(token, vector, acc));
  });
  transpose_tokens(s.q, l.key_row, 0, l.tokens, l.key_row, q_transposed);
  attention_scores(l, w, s.kv, l.kv_row, q_transposed, 0, l.tokens, s.scores, inverse_sum);
  for (int64_t m = 0; m < l.tokens; ++m) {
    T* row = s.scores + m * l.token_row;
    for (int64_t n = 0; n < l.token_row; n += lanes) store(row + n, load(row + n) * load(inverse_sum + n));
  }
}

// A head's output, [N] rows of values: epilogue(token, vector, acc).
template <class T, class Epilogue>
inline void weighted_values(const Layout<T>& l, const HeadState<T>& s, const Epilogue& epilogue) {
  gemm<T>(l.tokens, l.tokens, l.value_row / kLanes<T>, s.scores, 1, l.token_row, s.kv + l.key_row, l.kv_row, epilogue);
}

// sums[c] += the column sums of [N] rows, in parts of 16: a long sum in one accumulator would round more than what it is compared with.
template <class T>
inline void add_columns(int64_t tokens, const T* rows, int64_t row, int64_t columns, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < columns; c += lanes) {
    Vec<T> total = {};
    for (int64_t first = 0; first < tokens; first += 16) {
      Vec<T> sum = {};
      for (int64_t n = first; n < min_of<int64_t>(first + 16, tokens); ++n) sum += load(rows + n * row + c);
      total += sum;
    }
    store(sums + c, load(sums + c) + total);
  }
}

// total[r][c] += sum_n left[n][r] right[n][c].
template <class T>
inline void add_outer(int64_t tokens, const T* left, int64_t left_row, int64_t rows, const T* right, int64_t right_row, int64_t columns, T* total) {
  constexpr int64_t lanes = kLanes<T>;
  gemm<T>(rows, tokens, columns / lanes, left, 1, left_row, right, right_row, [&](int64_t row, int64_t vector, Vec<T> acc) {
    T* place = total + row * columns + vector * lanes;
    store(place, load(place) + acc);
  });
}

// From the gradient of a head's output to those of k and v, [N][q | k | v] (the q part is not written), of the convolved and scaled q, in a grid, and of the bias
// of every pair, added to `bias_grad` [N][token_row].
template <class T>
inline void attend_backward(
    const Layout<T>& l, const HeadState<T>& s, const T* grad_out, int64_t grad_out_row, T* grad_out_transposed, T* grad_scores, T* bias_grad, T* grad_qkv, T* grad_grid) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t N = l.tokens;
  transpose_tokens(grad_out, grad_out_row, 0, N, l.value_row, grad_out_transposed);
  gemm<T>(N, l.value_dim, l.token_row / lanes, s.kv + l.key_row, l.kv_row, 1, grad_out_transposed, l.token_row, [&](int64_t key, int64_t vector, Vec<T> acc) {
    store(grad_scores + key * l.token_row + vector * lanes, acc);
  });
  // Through the softmax: p (g - sum p g), a vector of queries at a time.
  for (int64_t n = 0; n < l.token_row; n += lanes) {
    const T* p = s.scores + n;
    T *g = grad_scores + n, *bias = bias_grad + n;
    Vec<T> mean = {};
    for (int64_t part = 0; part < N; part += 16) {
      Vec<T> sum = {};
      for (int64_t m = part; m < min_of<int64_t>(part + 16, N); ++m) sum += load(p + m * l.token_row) * load(g + m * l.token_row);
      mean += sum;
    }
    for (int64_t m = 0; m < N; ++m) {
      const int64_t at = m * l.token_row;
      const Vec<T> grad = load(p + at) * (load(g + at) - mean);
      store(g + at, grad);
      store(bias + at, load(bias + at) + grad);
    }
  }
  gemm<T>(N, N, l.value_row / lanes, s.scores, l.token_row, 1, grad_out, grad_out_row, [&](int64_t key, int64_t vector, Vec<T> acc) {
    store(grad_qkv + key * l.qkv_row + 2 * l.key_row + vector * lanes, acc);
  });
  gemm<T>(N, N, l.key_row / lanes, grad_scores, l.token_row, 1, s.q, l.key_row, [&](int64_t key, int64_t vector, Vec<T> acc) {
    store(grad_qkv + key * l.qkv_row + l.key_row + vector * lanes, acc);
  });
  gemm<T>(N, N, l.key_row / lanes, grad_scores, 1, l.token_row, s.kv, l.kv_row, [&](int64_t query, int64_t vector, Vec<T> acc) {
    store(grad_grid + l.place(query) + vector * lanes, acc);
  });
}

// kCount neighbouring taps of one row of a depthwise kernel: sums over the pixels of input times gradient.
template <int kCount, class T>
inline void tap_sums(const T* input, const T* grad, int64_t grid_row, int64_t stride, int64_t rows, int64_t columns, T* sums) {
  Vec<T> acc[kCount] = {};
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x) {
      const Vec<T> g = load(grad + y * grid_row + x * stride);
      const T* pixels = input + y * grid_row + x * stride;
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) acc[i] += g * load(pixels + i * stride);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(sums + i * stride, load(sums + i * stride) + acc[i]);
}

// sums[tap][key_row] += sum over pixels of q(pixel + tap) * grad(pixel), both in grids.
template <class T>
inline void add_taps(const Layout<T>& l, const T* grid, const T* grad_grid, int64_t kernel, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t half = kernel / 2, w = l.window, grid_row = l.grid_row * l.key_row;
  for (int64_t dy = max_of(-half, 1 - w); dy <= min_of(half, w - 1); ++dy) {
    const int64_t first = max_of<int64_t>(-dy, 0), rows = w - (dy < 0 ? -dy : dy);
    for (int64_t dx = 0; dx < kernel;) {
      const int64_t count = kernel - dx >= 7 ? 7 : kernel - dx >= 5 ? 5 : kernel - dx >= 3 ? 3 : 1;
      for (int64_t c = 0; c < l.key_row; c += lanes) {
        const T* input = grid + (first + dy) * grid_row + (l.margin - half + dx) * l.key_row + c;
        const T* grad = grad_grid + first * grid_row + l.margin * l.key_row + c;
        T* target = sums + ((dy + half) * kernel + dx) * l.key_row + c;
        switch (count) {
          case 7: tap_sums<7, T>(input, grad, grid_row, l.key_row, rows, w, target); break;
          case 5: tap_sums<5, T>(input, grad, grid_row, l.key_row, rows, w, target); break;
          case 3: tap_sums<3, T>(input, grad, grid_row, l.key_row, rows, w, target); break;
          default: tap_sums<1, T>(input, grad, grid_row, l.key_row, rows, w, target); break;
        }
      }
      dx += count;
    }
  }
}

// One worker's sums over its windows, kept apart and added up in a fixed order at the end, so that results do not depend on timing.
template <class T>
struct WeightSums {
  T *qkv, *qkv_bias, *dw, *dw_bias, *bias, *proj, *proj_bias;

  WeightSums() = default;
  static int64_t size(const Layout<T>& l, int64_t taps) {
    return l.heads * (l.qkv_row * l.split_row + l.qkv_row + l.key_row + l.tokens * l.token_row) + taps * l.key_row + l.channels * l.cat_row + l.channel_row;
  }
  WeightSums(const Layout<T>& l, int64_t taps, T* memory)
      : qkv(memory),
        qkv_bias(qkv + l.heads * l.qkv_row * l.split_row),
        dw(qkv_bias + l.heads * l.qkv_row),
        dw_bias(dw + taps * l.key_row),
        bias(dw_bias + l.heads * l.key_row),
        proj(bias + l.heads * l.tokens * l.token_row),
        proj_bias(proj + l.channels * l.cat_row) {}
};

// A long sum of windows rounds less if it is a sum of shorter ones: `recent` takes a few windows and is then emptied into `total`.
template <class T>
class LongSums {
 public:
  static constexpr int64_t kWindows = 16;
  LongSums(T* total, int64_t size) : total_(total), size_(size), recent_(size) {
    std::memset(total, 0, static_cast<size_t>(size) * sizeof(T));
    std::memset(recent_.get(), 0, static_cast<size_t>(size) * sizeof(T));
  }
  T* recent() const { return recent_; }
  void empty() const {
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      store(total_ + i, load(total_ + i) + load(recent_ + i));
      store(recent_ + i, Vec<T>{});
    }
  }

 private:
  T* const total_;
  const int64_t size_;
  const Buffer<T> recent_;
};

// total += the other workers' sums, in their order.
template <class T>
inline void add_workers(T* sums, int64_t size, int64_t workers) {
  constexpr int64_t lanes = kLanes<T>, kChunk = 4096;
  parallel(ceil_div(size, kChunk), [&](int64_t chunk) {
    const int64_t end = min_of(size, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; i += lanes) {
      Vec<T> sum = load(sums + i);
      for (int64_t w = 1; w < workers; ++w) sum += load(sums + w * size + i);
      store(sums + i, sum);
    }
  });
}

// Rows q | k | v of a padded [qkv_row][row] to a head's [2 * key_dim + value_dim][columns] of the tensor.
template <class T>
inline void write_qkv(const Layout<T>& l, int64_t head, const T* source, int64_t row, int64_t columns, void* target) {
  int64_t at = head * (2 * l.key_dim + l.value_dim) * columns;
  const auto part = [&](int64_t from, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r, at += columns) l.io.downcast(source + (from + r) * row, columns, l.io.at(target, at));
  };
  part(0, l.key_dim);
  part(l.key_row, l.key_dim);
  part(2 * l.key_row, l.value_dim);
}

// Sums [tap][key_row] times a factor to the tensor's [key_dim][tap], from element `first` on.
template <class T>
inline void write_taps(const Layout<T>& l, const T* sums, int64_t taps, T factor, void* target, int64_t first) {
  Buffer<T> values(l.key_dim * taps);
  for (int64_t c = 0; c < l.key_dim; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) values[c * taps + tap] = sums[tap * l.key_row + c] * factor;
  }
  l.io.downcast(values, l.key_dim * taps, l.io.at(target, first));
}

// The gradients of every pair's bias, [N][token_row], summed into the table [w * w].
template <class T>
inline void write_table(const Layout<T>& l, const T* pairs, void* target) {
  const int64_t w = l.window;
  Buffer<T> table(l.tokens);
  for (int64_t i = 0; i < l.tokens; ++i) table[i] = 0;
  for (int64_t n = 0; n < l.tokens; ++n) {
    for (int64_t m = 0; m < l.tokens; ++m) {
      const int64_t dy = n / w - m / w, dx = n % w - m % w;
      table[(dy < 0 ? -dy : dy) * w + (dx < 0 ? -dx : dx)] += pairs[n * l.token_row + m];
    }
  }
  l.io.downcast(table, l.tokens, target);
}

// `scale`: what the taps that the sums belong to were multiplied by.
template <class T>
void write_gradients(const Layout<T>& l, const Weights<T>& weights, const WeightSums<T>& sums, T scale, const Gradients& grad) {
  parallel(l.heads + 1, [&](int64_t i) {
    if (i == l.heads) {
      int64_t at = 0;
      for (int64_t c = 0; c < l.channels; ++c) {
        for (int64_t h = 0; h < l.heads; ++h, at += l.value_dim) l.io.downcast(sums.proj + c * l.cat_row + h * l.value_row, l.value_dim, l.io.at(grad.proj_weight, at));
      }
      if (grad.proj_bias) l.io.downcast(sums.proj_bias, l.channels, grad.proj_bias);
      return;
    }
    write_qkv<T>(l, i, sums.qkv + i * l.qkv_row * l.split_row, l.split_row, l.split, grad.qkv_weight);
    if (grad.qkv_bias) write_qkv<T>(l, i, sums.qkv_bias + i * l.qkv_row, 1, 1, grad.qkv_bias);
    const int64_t before = weights.taps_before(i), taps = weights.taps_before(i + 1) - before;
    write_taps<T>(l, sums.dw + before * l.key_row, taps, scale, grad.dw_weight, before * l.key_dim);
    if (grad.dw_bias) write_taps<T>(l, sums.dw_bias + i * l.key_row, 1, scale, grad.dw_bias, i * l.key_dim);
    write_table<T>(l, sums.bias + i * l.tokens * l.token_row, l.io.at(grad.attention_bias, i * l.tokens));
  });
}

template <class T>
struct BackwardPass {
  static constexpr int64_t lanes = kLanes<T>;

  const Backward& a;
  const Layout<T>& l;
  const Weights<T>& weights;
  const BackwardWeights<T>& backward_weights;

  struct Memory {
    T *x, *f, *states, *cat, *grad_y, *grad_cat, *grad_qkv, *grad_grid, *transposed, *grad_scores, *inverse_sum;

    static int64_t size(const Layout<T>& l) {
      const int64_t row = l.x_row + l.heads * l.split_row + 2 * l.cat_row + l.channel_row + l.qkv_row + l.token_row;
      return l.tokens * row + l.heads * HeadState<T>::size(l) + l.grid_size + max_of(l.key_row, l.value_row) * l.token_row + l.token_row;
    }
    Memory(const Layout<T>& l, T* memory)
        : x(memory),
          f(x + l.tokens * l.x_row),
          states(f + l.tokens * l.heads * l.split_row),
          cat(states + l.heads * HeadState<T>::size(l)),
          grad_y(cat + l.tokens * l.cat_row),
          grad_cat(grad_y + l.tokens * l.channel_row),
          grad_qkv(grad_cat + l.tokens * l.cat_row),
          grad_grid(grad_qkv + l.tokens * l.qkv_row),
          transposed(grad_grid + l.grid_size),
          grad_scores(transposed + max_of(l.key_row, l.value_row) * l.token_row),
          inverse_sum(grad_scores + l.tokens * l.token_row) {
      std::memset(grad_grid, 0, static_cast<size_t>(l.grid_size) * sizeof(T));
      for (int64_t h = 0; h < l.heads; ++h) std::memset(states + h * HeadState<T>::size(l), 0, static_cast<size_t>(l.grid_size) * sizeof(T));
    }
    HeadState<T> state(const Layout<T>& l, int64_t head) const {
      const T* input = head == 0 ? x : f + head * l.tokens * l.split_row;
      return {l, input, head == 0 ? l.x_row : l.split_row, states + head * HeadState<T>::size(l)};
    }
  };

  void forward_again(int64_t window, const Memory& m) const {
    l.io.load_window(Window(a.x, l, a.height, a.width, window), l.window, {l.heads, l.split, l.split_row, l.x_row}, m.x);
    for (int64_t head = 0; head < l.heads; ++head) {
      const HeadWeights<T> w = weights.head(head);
      const HeadState<T> s = m.state(l, head);
      attend_again(l, w, s, m.transposed, m.inverse_sum, [&](int64_t, int64_t vector, Vec<T> acc) { return acc + load(w.dw_bias + vector * lanes); });
      const bool feeds = head + 1 < l.heads;
      T* next = m.f + (head + 1) * l.tokens * l.split_row;
      weighted_values(l, s, [&](int64_t row, int64_t vector, Vec<T> out) {
        store(m.cat + row * l.cat_row + head * l.value_row + vector * lanes, relu(out));
        if (feeds) store(next + row * l.split_row + vector * lanes, out + load(m.x + row * l.x_row + (head + 1) * l.split_row + vector * lanes));
      });
    }
  }

  void window(int64_t index, const Memory& m, const WeightSums<T>& sums) const {
    forward_again(index, m);
    l.io.load_window(Window(a.grad_y, l, a.height, a.width, index), l.window, {1, l.channels, l.channel_row, l.channel_row}, m.grad_y);
    if (a.grad.proj_weight) {
      add_outer(l.tokens, m.grad_y, l.channel_row, l.channels, m.cat, l.cat_row, l.cat_row, sums.proj);
      add_columns(l.tokens, m.grad_y, l.channel_row, l.channel_row, sums.proj_bias);
    }
    const Panel<T> proj = backward_weights.proj();
    gemm<T>(l.tokens, l.channels, l.cat_row / lanes, m.grad_y, l.channel_row, 1, proj.data, proj.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      const int64_t at = row * l.cat_row + vector * lanes;
      store(m.grad_cat + at, load(m.cat + at) > 0 ? acc : Vec<T>{});
    });
    for (int64_t head = l.heads - 1; head >= 0; --head) head_backward(head, m, sums);
    // The gradient of x has taken the place of x.
    if (a.grad.x.data) l.io.store_window(Window(a.grad.x, l, a.height, a.width, index), l.window, {l.heads, l.split, l.split_row, l.x_row}, m.x, false);
  }

  void head_backward(int64_t head, const Memory& m, const WeightSums<T>& sums) const {
    const HeadState<T> s = m.state(l, head);
    const HeadWeights<T> w = weights.head(head);
    attend_backward(
        l, s, m.grad_cat + head * l.value_row, l.cat_row, m.transposed, m.grad_scores, sums.bias + head * l.tokens * l.token_row, m.grad_qkv, m.grad_grid);
    convolve(l, m.grad_grid, w.kernel, backward_weights.dw(head), 0, l.tokens, [&](int64_t token, int64_t vector, Vec<T> acc) {
      store(m.grad_qkv + token * l.qkv_row + vector * lanes, acc);
    });
    if (a.grad.qkv_weight) {
      add_taps(l, s.grid, m.grad_grid, w.kernel, sums.dw + weights.taps_before(head) * l.key_row);
      for (int64_t y = 0; y < l.window; ++y) add_columns(l.window, m.grad_grid + l.place(y * l.window), l.key_row, l.key_row, sums.dw_bias + head * l.key_row);
      add_outer(l.tokens, m.grad_qkv, l.qkv_row, l.qkv_row, s.f, s.f_row, l.split_row, sums.qkv + head * l.qkv_row * l.split_row);
      add_columns(l.tokens, m.grad_qkv, l.qkv_row, l.qkv_row, sums.qkv_bias + head * l.qkv_row);
    }
    if (head == 0 && !a.grad.x.data) return;
    const Panel<T> qkv = backward_weights.qkv(head);
    gemm<T>(l.tokens, l.qkv_row, l.split_row / lanes, m.grad_qkv, l.qkv_row, 1, qkv.data, qkv.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      store(m.x + row * l.x_row + head * l.split_row + vector * lanes, acc);
      if (head > 0) {
        T* previous = m.grad_cat + row * l.cat_row + (head - 1) * l.value_row + vector * lanes;
        store(previous, load(previous) + acc);
      }
    });
  }
};

template <class T>
void backward(const Backward& a) {
  const Layout<T> l(a);
  const Weights<T> weights(a, l, nullptr);
  const BackwardWeights<T> backward_weights(a, l, weights);
  const BackwardPass<T> pass{a, l, weights, backward_weights};
  const int64_t workers = max_of<int64_t>(1, min_of(num_threads(), l.windows)), size = WeightSums<T>::size(l, weights.taps());
  Buffer<T> sums_memory(workers * size);
  parallel(workers, [&](int64_t worker) {
    const LongSums<T> long_sums(sums_memory + worker * size, size);
    const WeightSums<T> sums(l, weights.taps(), long_sums.recent());
    Buffer<T> memory(BackwardPass<T>::Memory::size(l));
    const typename BackwardPass<T>::Memory m(l, memory);
    const Range range = share(l.windows, worker, workers);
    for (int64_t window = range.begin; window < range.end; ++window) {
      pass.window(window, m, sums);
      if ((window - range.begin) % LongSums<T>::kWindows == LongSums<T>::kWindows - 1) long_sums.empty();
    }
    long_sums.empty();
  });
  if (!a.grad.qkv_weight) return;
  add_workers<T>(sums_memory, size, workers);
  write_gradients<T>(l, weights, WeightSums<T>(l, weights.taps(), sums_memory), static_cast<T>(a.scale), a.grad);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
