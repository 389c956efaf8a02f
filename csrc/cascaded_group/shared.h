// What the forward and the backward of cascaded group attention share: where a window's pixels are, the weights as the tile product wants them, and the
// steps of one head.
//
// Inside a window everything is token-major, [N][channels padded to whole vectors]: then N = 49 tokens waste no lane (49 = 6 * 8 + 1 rows of a register
// block, where 49 columns would be four vectors of 16), the key dimension of 16 is one vector, and a pixel of the depthwise convolution is one load.
#pragma once

#include "cascaded_group/kernels.h"
#include "common/gemm.h"
#include "common/runs.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace cascaded_group;

struct Window;

// How tensors are read and written, by the type they are stored in. All else is compiled for the arithmetic type T alone: a third of the code that it would be
// with the storage type as a template parameter of everything.
template <class T>
struct Storage {
  bool plain;     // stored in T
  int64_t bytes;  // of an element
  void (*load_window)(const Window& at, int64_t window, const Channels& channels, T* out);
  void (*store_window)(const Window& at, int64_t window, const Channels& channels, const T* in, bool add);
  // target[r][c] = source[r * row_stride + c * column_stride].
  void (*pack)(const void* source, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* target, int64_t target_row);
  void (*downcast)(const T* source, int64_t count, void* target);

  const void* at(const void* data, int64_t offset) const { return static_cast<const char*>(data) + offset * bytes; }
  void* at(void* data, int64_t offset) const { return static_cast<char*>(data) + offset * bytes; }
};

template <class T>
const Storage<T>& storage_of(Dtype dtype);

// Sizes and strides, in elements of the arithmetic type.
template <class T>
struct Layout {
  static constexpr int64_t lanes = kLanes<T>;
  const Storage<T>& io;
  int64_t heads, split, key_dim, value_dim, channels, window, tokens;        // split: channels of x per head; tokens: of one window
  int64_t split_row, key_row, value_row, channel_row, token_row;             // the same, padded to whole vectors
  int64_t qkv_row, kv_row, x_row, cat_row;                                   // rows of several of them
  int64_t margin, grid_row, grid_size;                                       // q of a window, with zero columns left and right for the convolution
  int64_t rows_of_windows, columns_of_windows, windows;

  explicit Layout(const Attention& a)
      : io(storage_of<T>(a.dtype)), heads(a.heads), split(a.channels / a.heads), key_dim(a.key_dim), value_dim(a.value_dim), channels(a.channels), window(a.window),
        tokens(a.window * a.window), split_row(round_up(split, lanes)), key_row(round_up(key_dim, lanes)), value_row(round_up(value_dim, lanes)),
        channel_row(round_up(channels, lanes)), token_row(round_up(tokens, lanes)), qkv_row(2 * key_row + value_row), kv_row(key_row + value_row),
        x_row(heads * split_row), cat_row(heads * value_row), margin(0), rows_of_windows(ceil_div(a.height, window)),
        columns_of_windows(ceil_div(a.width, window)), windows(a.batch * rows_of_windows * columns_of_windows) {
    for (int64_t h = 0; h < heads; ++h) margin = max_of(margin, a.kernel_sizes[h] / 2);
    grid_row = window + 2 * margin;
    grid_size = window * grid_row * key_row;
  }

  int64_t place(int64_t token) const { return (token / window * grid_row + token % window + margin) * key_row; }
};

// --- windows of a map ---------------------------------------------------------------------------------------------------------------

// One window of a map: `rows` x `columns` of its pixels lie in the map, the others are padding.
struct Window {
  void* data;
  int64_t rows, columns, dim_stride, height_stride, width_stride;

  // From channel `first` on.
  template <class T>
  Window(const Map& map, const Layout<T>& l, int64_t height, int64_t width, int64_t index, int64_t first = 0)
      : dim_stride(map.dim_stride), height_stride(map.height_stride), width_stride(map.width_stride) {
    const int64_t per_sample = l.rows_of_windows * l.columns_of_windows, sample = index / per_sample, place = index % per_sample;
    const int64_t y = place / l.columns_of_windows * l.window, x = place % l.columns_of_windows * l.window;
    rows = min_of(l.window, height - y);
    columns = min_of(l.window, width - x);
    data = l.io.at(map.data, sample * map.batch_stride + first * dim_stride + y * height_stride + x * width_stride);
  }
};

// body(data of the run's first token, its number in the window, tokens, token stride) for the runs of equally spaced tokens that a window consists of.
template <class S, class Body>
inline void for_runs(const Window& at, int64_t window, const Body& body) {
  S* data = static_cast<S*>(at.data);
  if (at.columns == window && (at.height_stride == window * at.width_stride || at.rows == 1)) return body(data, int64_t{0}, at.rows * window, at.width_stride);
  for (int64_t y = 0; y < at.rows; ++y) body(data + y * at.height_stride, y * window, at.columns, at.width_stride);
}

// A window's tokens, [N][channels]; padding pixels are zero.
template <class S>
void load_window(const Window& at, int64_t window, const Channels& c, Arith<S>* out) {
  const int64_t row = c.total;
  for_runs<S>(at, window, [&](const S* data, int64_t token, int64_t count, int64_t stride) { load_run(data, at.dim_stride, stride, count, c, out + token * row); });
  const auto clear = [&](int64_t token, int64_t count) { std::memset(out + token * row, 0, static_cast<size_t>(count * row) * sizeof(*out)); };
  if (at.columns < window) {
    for (int64_t y = 0; y < at.rows; ++y) clear(y * window + at.columns, window - at.columns);
  }
  clear(at.rows * window, (window - at.rows) * window);
}

// The way back, or with `add` onto what is there; padding pixels are dropped.
template <class S>
void store_window(const Window& at, int64_t window, const Channels& c, const Arith<S>* in, bool add) {
  const int64_t row = c.total;
  for_runs<S>(at, window, [&](S* data, int64_t token, int64_t count, int64_t stride) { store_run(data, at.dim_stride, stride, count, c, in + token * row, add); });
}

// --- weights ------------------------------------------------------------------------------------------------------------------------

template <class S>
void pack(const void* data, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Arith<S>* target, int64_t target_row) {
  using T = Arith<S>;
  const S* source = static_cast<const S*>(data);
  constexpr int64_t lanes = kLanes<T>;
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) upcast(source + r * row_stride, columns, target + r * target_row);
    return;
  }
  int64_t whole_rows = 0, whole_columns = 0;
  if (row_stride == 1) {
    whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
    for (int64_t r = 0; r < whole_rows; r += lanes) {
      for (int64_t c = 0; c < whole_columns; c += lanes) {
        Vec<T> block[lanes];
        for (int64_t i = 0; i < lanes; ++i) block[i] = load(source + r + (c + i) * column_stride);
        transpose<T>(block);
        for (int64_t i = 0; i < lanes; ++i) store(target + (r + i) * target_row + c, block[i]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) target[r * target_row + c] = to_float(source[r * row_stride + c * column_stride]);
  }
}

template <class S>
void downcast(const Arith<S>* source, int64_t count, void* data) {
  constexpr int64_t lanes = kLanes<Arith<S>>;
  S* target = static_cast<S*>(data);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
  for (; i < count; ++i) store_scalar(target + i, source[i]);
}

template <class S>
constexpr Storage<Arith<S>> kStorage = {std::is_same_v<S, Arith<S>>, sizeof(S), load_window<S>, store_window<S>, pack<S>, downcast<S>};

template <>
const Storage<double>& storage_of(Dtype) { return kStorage<double>; }
template <>
const Storage<float>& storage_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? kStorage<float> : dtype == Dtype::kBFloat16 ? kStorage<BFloat16> : kStorage<Float16>;
}

// A matrix [rows][row]: the tensor's own memory or a packed copy.
template <class T>
struct Panel {
  const T* data;
  int64_t row;
};

// One head's weights.
template <class T>
struct HeadWeights {
  Panel<T> qkv;       // [split][q | k | v]
  const T* qkv_bias;  // [q | k | v]
  const T* qkv_factor;  // [q | k | v], multiplied in before the bias is added; null: 1
  const T* dw;        // [k * k][key_row], the scale on q^T k multiplied in
  const T* dw_bias;   // [key_row], likewise
  const T* bias;      // [N][token_row]: the bias of every pair of tokens; one more vector may be read behind it
  int64_t kernel;
};

// What the constructors of weights share: whether a tensor's own memory serves.
template <class T>
bool whole_vectors(const Layout<T>& l) {
  return l.io.plain && l.key_dim == l.key_row && l.value_dim == l.value_row;
}

template <class T>
class Weights {
 public:
  Weights(const Attention& a, const Layout<T>& l, const void* proj_bias)
      : a_(a), l_(l), qkv_in_place_(whole_vectors(l) && a.qkv_weight.row_stride == 1),
        proj_in_place_(whole_vectors(l) && a.proj_weight.row_stride == 1 && l.channels == l.channel_row),
        qkv_(qkv_in_place_ ? 0 : l.heads * l.split * l.qkv_row), proj_(proj_in_place_ ? 0 : l.cat_row * l.channel_row),
        vectors_(l.heads * (l.qkv_row + l.key_row) + l.channel_row), dw_(taps_before(l.heads) * l.key_row), bias_(l.heads * l.tokens * l.token_row + l.lanes) {
    for (int64_t i = 0; i < l.lanes; ++i) bias_[l.heads * l.tokens * l.token_row + i] = 0;
    const int64_t proj_tasks = proj_in_place_ ? 0 : l.heads;
    parallel(l.heads + proj_tasks, [&](int64_t i) {
      if (i < l_.heads) {
        pack_head(i);
      } else {
        pack_proj(i - l_.heads);
      }
    });
    copy(proj_bias, 0, l.channels, l.channel_row, vectors_ + l.heads * (l.qkv_row + l.key_row));
  }

  // Taps of the heads before head i, and of all of them.
  int64_t taps_before(int64_t i) const {
    int64_t sum = 0;
    for (int64_t h = 0; h < i; ++h) sum += a_.kernel_sizes[h] * a_.kernel_sizes[h];
    return sum;
  }
  int64_t taps() const { return taps_before(l_.heads); }

  HeadWeights<T> head(int64_t i) const {
    const Panel<T> qkv = qkv_in_place_ ? Panel<T>{static_cast<const T*>(a_.qkv_weight.data) + i * a_.qkv_weight.head_stride, a_.qkv_weight.column_stride}
                                       : Panel<T>{qkv_ + i * l_.split * l_.qkv_row, l_.qkv_row};
    return {qkv, qkv_bias(i), nullptr, dw_ + taps_before(i) * l_.key_row, dw_bias(i), bias_ + i * l_.tokens * l_.token_row, a_.kernel_sizes[i]};
  }
  // [cat_row][channels]
  Panel<T> proj() const {
    if (proj_in_place_) return {static_cast<const T*>(a_.proj_weight.data), a_.proj_weight.column_stride};
    return {proj_, l_.channel_row};
  }
  const T* proj_bias() const { return vectors_ + l_.heads * (l_.qkv_row + l_.key_row); }

 private:
  T* qkv_bias(int64_t i) const { return vectors_ + i * l_.qkv_row; }
  T* dw_bias(int64_t i) const { return vectors_ + l_.heads * l_.qkv_row + i * l_.key_row; }

  // Elements [first, first + count) of a vector, or zeros where there is none, padded with zeros.
  void copy(const void* source, int64_t first, int64_t count, int64_t padded, T* target) const {
    if (source) l_.io.pack(l_.io.at(source, first), 0, 1, 1, count, target, padded);
    for (int64_t i = source ? count : 0; i < padded; ++i) target[i] = 0;
  }

  void pack_head(int64_t i) const {
    const int64_t rows = 2 * l_.key_dim + l_.value_dim;
    if (!qkv_in_place_) {
      const Matrix& m = a_.qkv_weight;
      T* target = qkv_ + i * l_.split * l_.qkv_row;
      if (l_.key_dim != l_.key_row || l_.value_dim != l_.value_row) std::memset(target, 0, static_cast<size_t>(l_.split * l_.qkv_row) * sizeof(T));
      const auto part = [&](int64_t from, int64_t count, int64_t to) {
        l_.io.pack(l_.io.at(m.data, i * m.head_stride + from * m.row_stride), m.column_stride, m.row_stride, l_.split, count, target + to, l_.qkv_row);
      };
      part(0, l_.key_dim, 0);
      part(l_.key_dim, l_.key_dim, l_.key_row);
      part(2 * l_.key_dim, l_.value_dim, 2 * l_.key_row);
    }
    copy(a_.qkv_bias, i * rows, l_.key_dim, l_.key_row, qkv_bias(i));
    copy(a_.qkv_bias, i * rows + l_.key_dim, l_.key_dim, l_.key_row, qkv_bias(i) + l_.key_row);
    copy(a_.qkv_bias, i * rows + 2 * l_.key_dim, l_.value_dim, l_.value_row, qkv_bias(i) + 2 * l_.key_row);

    const int64_t before = taps_before(i), count = a_.kernel_sizes[i] * a_.kernel_sizes[i];
    const T scale = static_cast<T>(a_.scale);
    T* taps = dw_ + before * l_.key_row;
    if (l_.key_dim != l_.key_row) std::memset(taps, 0, static_cast<size_t>(count * l_.key_row) * sizeof(T));
    l_.io.pack(l_.io.at(a_.dw_weight, before * l_.key_dim), 1, count, count, l_.key_dim, taps, l_.key_row);
    for (int64_t c = 0; c < count * l_.key_row; ++c) taps[c] *= scale;
    copy(a_.dw_bias, i * l_.key_dim, l_.key_dim, l_.key_row, dw_bias(i));
    for (int64_t c = 0; c < l_.key_row; ++c) dw_bias(i)[c] *= scale;

    expand_bias(l_.io.at(a_.attention_bias, i * l_.tokens), bias_ + i * l_.tokens * l_.token_row);
  }

  void pack_proj(int64_t head) const {
    const Matrix& m = a_.proj_weight;
    T* target = proj_ + head * l_.value_row * l_.channel_row;
    if (l_.value_dim != l_.value_row || l_.channels != l_.channel_row) {
      std::memset(target, 0, static_cast<size_t>(l_.value_row * l_.channel_row) * sizeof(T));
    }
    l_.io.pack(l_.io.at(m.data, head * l_.value_dim * m.column_stride), m.column_stride, m.row_stride, l_.value_dim, l_.channels, target, l_.channel_row);
  }

  // [w * w] table -> [N][token_row]. The keys of one row of the window read a run of the table mirrored about dx = 0: whole vectors, each overwriting what the one
  // before wrote too far.
  void expand_bias(const void* source, T* out) const {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t w = l_.window, mirror_row = 2 * w - 1 + lanes;
    Buffer<T> table(l_.tokens), mirror(w * mirror_row);
    l_.io.pack(source, 0, 1, 1, l_.tokens, table, l_.tokens);
    for (int64_t dy = 0; dy < w; ++dy) {
      for (int64_t j = 0; j < mirror_row; ++j) {
        const int64_t dx = j < w ? w - 1 - j : j - (w - 1);
        mirror[dy * mirror_row + j] = dx < w ? table[dy * w + dx] : T(0);
      }
    }
    for (int64_t y = 0; y < w; ++y) {
      for (int64_t x = 0; x < w; ++x) {
        T* row = out + (y * w + x) * l_.token_row;
        for (int64_t key_y = 0; key_y < w; ++key_y) {
          const T* run = mirror + (y < key_y ? key_y - y : y - key_y) * mirror_row + w - 1 - x;
          for (int64_t c = 0; c < w; c += lanes) {
            const int64_t at = key_y * w + c;
            if (at + lanes <= l_.token_row) {
              store(row + at, load(run + c));
            } else {
              for (int64_t i = c; i < w; ++i) row[key_y * w + i] = run[i];
            }
          }
        }
        for (int64_t m = l_.tokens; m < l_.token_row; ++m) row[m] = 0;
      }
    }
  }

  const Attention& a_;
  const Layout<T>& l_;
  const bool qkv_in_place_, proj_in_place_;
  const Buffer<T> qkv_, proj_, vectors_, dw_, bias_;
};

// --- the steps of one head, for tokens [first, last) of a window ----------------------------------------------------------------------

// One head's q in the convolution's grid, and [N][k | v].
template <class T>
struct Projected {
  T *grid, *kv;
};

// q, k, v = W f + b; the vectors [from, to) of the outputs, which are laid out q | k | v.
template <class T>
inline void project(
    const Layout<T>& l, const HeadWeights<T>& head, const T* f, int64_t f_row, int64_t first, int64_t last, int64_t from, int64_t to, Projected<T> out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t query_vectors = l.key_row / lanes;
  const T *bias = head.qkv_bias + from * lanes, *factor = head.qkv_factor ? head.qkv_factor + from * lanes : nullptr;
  gemm<T>(last - first, l.split, to - from, f + first * f_row, f_row, 1, head.qkv.data + from * lanes, head.qkv.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
    const int64_t column = from + vector;
    T* target = column < query_vectors ? out.grid + l.place(first + row) + column * lanes : out.kv + (first + row) * l.kv_row + (column - query_vectors) * lanes;
    store(target, (factor ? acc * load(factor + vector * lanes) : acc) + load(bias + vector * lanes));
  });
}

// kCount neighbouring pixels of a depthwise convolution, one vector of channels: the taps' weights are loaded once for all of them.
template <int kCount, class T>
inline void convolve_pixels(const T* source, int64_t grid_row, int64_t stride, int64_t rows, int64_t kernel, const T* weights, Vec<T>* out) {
  Vec<T> acc[kCount] = {};
  for (int64_t dy = 0; dy < rows; ++dy) {
    for (int64_t dx = 0; dx < kernel; ++dx) {
      const Vec<T> weight = load(weights + (dy * kernel + dx) * stride);
      const T* pixels = source + dy * grid_row + dx * stride;
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) acc[i] += weight * load(pixels + i * stride);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) out[i] = acc[i];
}

// A depthwise convolution over a grid of [w][grid_row][key_row], zero outside the window; epilogue(token, vector, acc).
template <class T, class Epilogue>
inline void convolve(const Layout<T>& l, const T* grid, int64_t kernel, const T* weights, int64_t first, int64_t last, const Epilogue& epilogue) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t half = kernel / 2, w = l.window, grid_row = l.grid_row * l.key_row;
  for (int64_t y = first / w; y * w < last; ++y) {
    const int64_t top = max_of<int64_t>(y - half, 0), bottom = min_of(y + half, w - 1), end = min_of(last - y * w, w);
    for (int64_t x = max_of<int64_t>(first - y * w, 0); x < end;) {
      const int64_t count = min_of<int64_t>(end - x, 8);
      for (int64_t vector = 0; vector < l.key_row / lanes; ++vector) {
        const T* source = grid + top * grid_row + (x + l.margin - half) * l.key_row + vector * lanes;
        const T* taps = weights + (top - (y - half)) * kernel * l.key_row + vector * lanes;
        Vec<T> out[8] = {};
        const auto run = [&]<int kCount>() { convolve_pixels<kCount, T>(source, grid_row, l.key_row, bottom - top + 1, kernel, taps, out); };
        switch (count) {
          case 1: run.template operator()<1>(); break;
          case 2: run.template operator()<2>(); break;
          case 3: run.template operator()<3>(); break;
          case 4: run.template operator()<4>(); break;
          case 5: run.template operator()<5>(); break;
          case 6: run.template operator()<6>(); break;
          case 7: run.template operator()<7>(); break;
          default: run.template operator()<8>(); break;
        }
        for (int64_t i = 0; i < count; ++i) epilogue(y * w + x + i, vector, out[i]);
      }
      x += count;
    }
  }
}

// Tokens [first, last) of `columns` channels (a multiple of the lanes), `row` apart -> [columns][tokens padded to whole vectors], zero in the padding.
template <class T>
inline void transpose_tokens(const T* source, int64_t row, int64_t first, int64_t last, int64_t columns, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t out_row = round_up(last - first, lanes);
  for (int64_t t = first; t < last; t += lanes) {
    const int64_t count = min_of(last - t, lanes);
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<T> block[lanes] = {};
      for (int64_t i = 0; i < count; ++i) block[i] = load(source + (t + i) * row + c);
      transpose<T>(block);
      for (int64_t i = 0; i < lanes; ++i) store(out + (c + i) * out_row + t - first, block[i]);
    }
  }
}

// exp(k_m^T q_n + bias_mn - max_m) for all keys m and the queries n in [first, last), and the inverse of each query's sum. Keys go down the rows of `scores`
// [N][queries padded to whole vectors] and queries along the lanes, so that maxima and sums need no step across lanes. q is transposed and carries the scale;
// the bias is symmetric.
template <class T>
inline void attention_scores(
    const Layout<T>& l, const HeadWeights<T>& head, const T* keys, int64_t keys_row, const T* q_transposed, int64_t first, int64_t last, T* scores, T* inverse_sum) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t row = round_up(last - first, lanes);
  const T* bias = head.bias + first;
  gemm<T>(l.tokens, l.key_dim, row / lanes, keys, keys_row, 1, q_transposed, row, [&](int64_t key, int64_t vector, Vec<T> acc) {
    store(scores + key * row + vector * lanes, acc + load(bias + key * l.token_row + vector * lanes));
  });
  // Sums in parts of 16 keys: a long sum in one accumulator would round more than what it is compared with.
  const auto normalise = [&]<int kVectors>(T* columns, T* inverse) {
    Vec<T> largest[kVectors], sum[kVectors] = {};
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) largest[j] = load(columns + j * lanes);
    for (int64_t m = 1; m < l.tokens; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) largest[j] = max_vec(largest[j], load(columns + m * row + j * lanes));
    }
    for (int64_t part = 0; part < l.tokens; part += 16) {
      Vec<T> part_sum[kVectors] = {};
      for (int64_t m = part; m < min_of<int64_t>(part + 16, l.tokens); ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          T* place = columns + m * row + j * lanes;
          const Vec<T> e = exp_nonpositive(load(place) - largest[j]);
          store(place, e);
          part_sum[j] += e;
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[j] += part_sum[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(inverse + j * lanes, T(1) / sum[j]);
  };
  int64_t column = 0;
  for (; column + 4 * lanes <= row; column += 4 * lanes) normalise.template operator()<4>(scores + column, inverse_sum + column);
  for (; column + 2 * lanes <= row; column += 2 * lanes) normalise.template operator()<2>(scores + column, inverse_sum + column);
  for (; column < row; column += lanes) normalise.template operator()<1>(scores + column, inverse_sum + column);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
