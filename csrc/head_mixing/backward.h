// The backward, from the logsumexp and small tensors: no map is stored. A tile is some queries, all keys and all heads: a row of every head's map is whole in it.
//
//   P = exp(S - lse);  y = dM = dO V^T;  dZ follows from y and the mixed maps, through the norm;  dP_h = sum_g mix[g][h] dZ_g
//   dS = P (dP - delta), delta = sum_j P dP;  dQ = dS K, dK = dS^T Q, dV = M^T dO
//
// A live batch norm has a pass of its own before that: sums over the whole batch of y, y x and x x (x: the maps minus `centre`), from which dZ is known.
#pragma once

#include "head_mixing/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Of a backward tile's maps and gradients.
constexpr int64_t kBackwardBytes = 640 << 10;

// Everything the backward reads more than once, of one sample: all heads' rows, and operands of the products q k^T and dO V^T.
template <class T, class P>
class Sample {
 public:
  explicit Sample(const Backward& a, const Sizes<T>& n, const P& products)
      : a_(a), n_(n), products_(products), keys_t_(n.heads * products.panels_size(n.dim)), values_t_(n.heads * products.panels_size(n.value_dim)),
        keys_(n.heads * n.tokens * n.dim_row), queries_(n.heads * n.tokens * n.dim_row), grad_out_(n.heads * n.tokens * n.value_row),
        left_queries_(P::kLeftIsRows ? 0 : n.heads * n.tokens * products.left_row(n.dim)),
        left_grad_out_(P::kLeftIsRows ? 0 : n.heads * n.tokens * products.left_row(n.value_dim)) {}

  void load(int64_t sample) {
    const Storage<T>& io = storage_of<T>(a_.dtype);
    parallel(n_.heads, [&](int64_t h) {
      const HeadRows q = head_rows(io, a_.q, sample, h), k = head_rows(io, a_.k, sample, h), grad_out = head_rows(io, a_.grad_out, sample, h);
      products_.pack_panels(k, n_.dim, keys_t_ + h * products_.panels_size(n_.dim));
      products_.pack_panels(head_rows(io, a_.v, sample, h), n_.value_dim, values_t_ + h * products_.panels_size(n_.value_dim));
      io.load_rows(k, n_.tokens, n_.dim, keys_ + h * n_.tokens * n_.dim_row, n_.dim_row);
      io.load_rows(q, n_.tokens, n_.dim, queries_ + h * n_.tokens * n_.dim_row, n_.dim_row);
      io.load_rows(grad_out, n_.tokens, n_.value_dim, grad_out_ + h * n_.tokens * n_.value_row, n_.value_row);
      if constexpr (!P::kLeftIsRows) {
        products_.pack_left(q, n_.tokens, n_.dim, left_queries_ + h * n_.tokens * products_.left_row(n_.dim));
        products_.pack_left(grad_out, n_.tokens, n_.value_dim, left_grad_out_ + h * n_.tokens * products_.left_row(n_.value_dim));
      }
    });
  }

  const T* keys(int64_t head) const { return keys_ + head * n_.tokens * n_.dim_row; }
  const T* queries(int64_t head, int64_t row) const { return queries_ + (head * n_.tokens + row) * n_.dim_row; }
  const T* grad_out(int64_t head, int64_t row) const { return grad_out_ + (head * n_.tokens + row) * n_.value_row; }

  // epilogue(row, vector, sums) of q k^T, and of dO V^T, for rows [first, first + rows) of a head.
  template <class Epilogue>
  void logits(int64_t head, int64_t first, int64_t rows, const Epilogue& epilogue) const {
    const T* left = P::kLeftIsRows ? queries(head, first) : left_queries_ + (head * n_.tokens + first) * products_.left_row(n_.dim);
    products_.product(rows, n_.dim, left, keys_t_ + head * products_.panels_size(n_.dim), epilogue);
  }
  template <class Epilogue>
  void map_gradients(int64_t head, int64_t first, int64_t rows, const Epilogue& epilogue) const {
    const T* left = P::kLeftIsRows ? grad_out(head, first) : left_grad_out_ + (head * n_.tokens + first) * products_.left_row(n_.value_dim);
    products_.product(rows, n_.value_dim, left, values_t_ + head * products_.panels_size(n_.value_dim), epilogue);
  }

 private:
  const Backward& a_;
  const Sizes<T>& n_;
  const P& products_;
  Buffer<T> keys_t_, values_t_, keys_, queries_, grad_out_, left_queries_, left_grad_out_;
};

// What a batch norm or its absence does to a map's gradient: dZ_g = factor (y_g - mean_y - x_hat_g mean_yx), x_hat_g = inverse (sum_h mix[g][h] x_h - mean).
template <class T>
struct Slope {
  T factor, inverse, mean, mean_y, mean_yx;
};

// Sums over a unit's queries and all keys, x: the maps minus `centre`.
struct Totals {
  double *yx, *xx, *y, *x, *weight;  // [heads][heads] twice, [heads] three times: y x, x x, y, x, and dM x_hat of a layer norm
  double* constant;                  // [heads]: dM itself of a layer norm, whose y is dZ

  static int64_t size(int64_t heads) { return 2 * heads * heads + 4 * heads; }
  Totals(double* memory, int64_t heads)
      : yx(memory), xx(yx + heads * heads), y(xx + heads * heads), x(y + heads), weight(x + heads), constant(weight + heads) {}
};

template <class T>
class BackwardTile {
 public:
  BackwardTile(const Backward& a, const Sizes<T>& n, const Mixing<T>& mixing, int64_t rows)
      : a_(a), n_(n), mixing_(mixing), head_size_(n.head_size(rows)), maps_(n.heads * head_size_), grads_(n.heads * head_size_),
        factors_(a.dropout ? n.heads * head_size_ : 0), mixed_(n.heads * n.map_row), left_(n.heads * n.map_row), right_(n.heads * n.map_row),
        yx_(n.heads, false), xx_(n.heads, true) {
    // What lies beyond the last key is read, and never written.
    std::memset(maps_.get(), 0, static_cast<size_t>(n.heads * head_size_) * sizeof(T));
    std::memset(grads_.get(), 0, static_cast<size_t>(n.heads * head_size_) * sizeof(T));
    for (int64_t g = 0; g < n.heads; ++g) {
      for (int64_t h = 0; h < n.heads; ++h) transposed_[h * n.heads + g] = mixing.mix[g * n.heads + h];
    }
  }

  T* maps(int64_t head) { return maps_ + head * head_size_; }
  T* grads(int64_t head) { return grads_ + head * head_size_; }

  // P and y of queries [first, first + rows) of a sample.
  template <class P>
  void fill(const Sample<T, P>& s, int64_t sample, int64_t first, int64_t rows) {
    constexpr int64_t lanes = kLanes<T>;
    const T scale = static_cast<T>(a_.scale);
    const int64_t vectors = ceil_div(n_.tokens, lanes);
    for (int64_t h = 0; h < n_.heads; ++h) {
      T *p = maps(h), *y = grads(h);
      const double* lse = a_.lse + (sample * n_.heads + h) * n_.tokens + first;
      T high[kMostRows], low[kMostRows];  // of a large logsumexp one float would leave too much
      for (int64_t i = 0; i < rows; ++i) high[i] = static_cast<T>(lse[i]), low[i] = static_cast<T>(lse[i] - static_cast<double>(high[i]));
      s.logits(h, first, rows, [&](int64_t i, int64_t c, Vec<T> acc) {
        const Vec<T> value = exp((acc * scale - high[i]) - low[i]);
        store(p + i * n_.map_row + c * lanes, c + 1 < vectors ? value : first_lanes<T>(value, n_.tokens - c * lanes, T(0)));
      });
      s.map_gradients(h, first, rows, [&](int64_t i, int64_t c, Vec<T> acc) { store(y + i * n_.map_row + c * lanes, acc); });
      if (!a_.dropout) continue;
      T* f = factors_ + h * head_size_;
      for (int64_t i = 0; i < rows * n_.map_row; ++i) f[i] = 1;
      drop_rows<T>(a_, sample, h, first, rows, f, n_.map_row, 0, n_.tokens);
    }
  }

  // The pass before a live batch norm's backward: the tile's sums.
  void sum(int64_t rows, Totals& totals) {
    Vec<T> x[kMostHeads][2];
    yx_.clear(), xx_.clear();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n_.map_row; j += kPanel<T>) {
        load_maps(i, j, x);
        put(x, right_, n_.map_row, j);
      }
      yx_.add_row(grads_ + i * n_.map_row, head_size_, right_, n_.map_row, n_.map_row);
      xx_.add_row(right_, n_.map_row, right_, n_.map_row, n_.map_row);
      for (int64_t h = 0; h < n_.heads; ++h) totals.y[h] += row_sum(grads(h) + i * n_.map_row, n_.map_row), totals.x[h] += row_sum(right_ + h * n_.map_row, n_.map_row);
    }
    yx_.add_to(totals.yx), xx_.add_to(totals.xx);
  }

  // Maps become M and gradients dS; unless the norm is live, the tile's sums are added.
  void differentiate(int64_t rows, const Slope<T>* slopes, Totals& totals) {
    const T zeros[kMostHeads] = {};
    const bool layer = a_.norm == Norm::kLayer;
    Vec<T> x[kMostHeads][2], z[kMostHeads][2], y[kMostHeads][2], dp[kMostHeads][2], weight[kMostHeads], along[kMostHeads];
    yx_.clear();
    for (int64_t g = 0; g < n_.heads; ++g) weight[g] = Vec<T>{};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t g = 0; g < n_.heads; ++g) {
        along[g] = Vec<T>{};
        if (layer) totals.constant[g] += row_sum(grads(g) + i * n_.map_row, n_.map_row);
      }
      for (int64_t j = 0; j < n_.map_row; j += kPanel<T>) {
        const int64_t valid = n_.tokens - j;
        load_maps(i, j, x);
        mix<T>(n_.heads, mixing_.mix, mixing_.start, x, z);
        for (int64_t g = 0; g < n_.heads; ++g) y[g][0] = load(grads(g) + i * n_.map_row + j), y[g][1] = load(grads(g) + i * n_.map_row + j + kLanes<T>);
        if (!a_.live) {
          put(x, right_, n_.map_row, j);
          if (!layer) put(y, left_, n_.map_row, j);
        }
        if (layer) {
          through_layer_norm(valid, z, y, weight);
          put(y, left_, n_.map_row, j);
        } else {
          through_slopes(slopes, z, y);
        }
        put(z, mixed_, n_.map_row, j);
        mix<T>(n_.heads, transposed_, zeros, y, dp);
        for (int64_t h = 0; h < n_.heads; ++h) {
          for (int u = 0; u < 2; ++u) {
            const int64_t at = h * head_size_ + i * n_.map_row + j + u * kLanes<T>;
            const Vec<T> grad = a_.dropout ? dp[h][u] * load(factors_ + at) : dp[h][u];
            along[h] += load(maps_ + at) * grad;
            store(grads_ + at, grad);
          }
        }
      }
      if (!a_.live) {
        yx_.add_row(left_, n_.map_row, right_, n_.map_row, n_.map_row);
        for (int64_t h = 0; h < n_.heads; ++h) totals.y[h] += row_sum(left_ + h * n_.map_row, n_.map_row);
      }
      for (int64_t h = 0; h < n_.heads; ++h) {
        const Vec<T> delta = broadcast(reduce_add<T>(along[h]));
        T *map = maps(h) + i * n_.map_row, *grad = grads(h) + i * n_.map_row;
        for (int64_t j = 0; j < n_.map_row; j += kLanes<T>) {
          store(grad + j, load(map + j) * (load(grad + j) - delta));
          store(map + j, load(mixed_ + h * n_.map_row + j));
        }
      }
    }
    if (!a_.live) yx_.add_to(totals.yx);
    for (int64_t g = 0; g < n_.heads; ++g) totals.weight[g] += static_cast<double>(reduce_add<T>(weight[g]));
  }

 private:
  // Two vectors of the maps of all heads as the forward mixed them: dropped and centred; zero beyond the last key.
  void load_maps(int64_t i, int64_t j, Vec<T> (*x)[2]) const {
    const Vec<T> centre = broadcast(static_cast<T>(a_.centre));
    const bool last = j + kPanel<T> > n_.tokens;
    for (int64_t h = 0; h < n_.heads; ++h) {
      for (int u = 0; u < 2; ++u) {
        const int64_t at = h * head_size_ + i * n_.map_row + j + u * kLanes<T>;
        Vec<T> p = load(maps_ + at);
        if (a_.dropout) p *= load(factors_ + at);
        x[h][u] = last ? first_lanes<T>(p - centre, n_.tokens - j - u * kLanes<T>, T(0)) : p - centre;
      }
    }
  }

  void put(const Vec<T> (*values)[2], T* rows, int64_t row, int64_t j) const {
    for (int64_t h = 0; h < n_.heads; ++h) store(rows + h * row + j, values[h][0]), store(rows + h * row + j + kLanes<T>, values[h][1]);
  }

  // z: the mixed maps; becomes what multiplies V without the constant. y: dM, becomes dZ.
  void through_slopes(const Slope<T>* slopes, Vec<T> (*z)[2], Vec<T> (*y)[2]) const {
    for (int64_t g = 0; g < n_.heads; ++g) {
      const Slope<T>& s = slopes[g];
      for (int u = 0; u < 2; ++u) {
        if (a_.live) y[g][u] -= s.mean_y + (z[g][u] - s.mean) * s.inverse * s.mean_yx;
        y[g][u] *= s.factor;
        z[g][u] *= s.factor;
      }
    }
  }

  // The same through a layer norm; sums of dM x_hat are added to weight. Of the vectors, `valid` elements are there.
  void through_layer_norm(int64_t valid, Vec<T> (*z)[2], Vec<T> (*y)[2], Vec<T>* weight) const {
    const T share = T(1) / static_cast<T>(n_.heads), eps = static_cast<T>(a_.eps);
    for (int u = 0; u < 2; ++u) {
      Vec<T> squares{}, slope{}, along{};
      for (int64_t g = 0; g < n_.heads; ++g) squares += z[g][u] * z[g][u];
      Vec<T> inverse = T(1) / square_root<T>(squares * share + eps);
      if (valid < kPanel<T>) inverse = first_lanes<T>(inverse, valid - u * kLanes<T>, T(0));
      for (int64_t g = 0; g < n_.heads; ++g) {
        z[g][u] *= inverse;
        weight[g] += y[g][u] * z[g][u];
        y[g][u] *= mixing_.weight[g];
        slope += y[g][u], along += y[g][u] * z[g][u];
      }
      slope *= share, along *= share;
      for (int64_t g = 0; g < n_.heads; ++g) {
        y[g][u] = (y[g][u] - slope - z[g][u] * along) * inverse;
        z[g][u] *= mixing_.weight[g];
      }
    }
  }

  const Backward& a_;
  const Sizes<T>& n_;
  const Mixing<T>& mixing_;
  const int64_t head_size_;
  Buffer<T> maps_, grads_, factors_, mixed_, left_, right_;
  PairSums<T> yx_, xx_;
  T transposed_[kMostHeads * kMostHeads];
};

// sum y_g x_hat_g of a batch norm.
inline double hat_product(const Backward& a, const Totals& t, int64_t g) {
  double sum = -a.mean[g] * t.y[g];
  for (int64_t h = 0; h < a.heads; ++h) sum += a.mix[g * a.heads + h] * t.yx[g * a.heads + h];
  return sum / a.std[g];
}

// The slopes of what is affine, from the totals over the whole batch.
template <class T>
void make_slopes(const Backward& a, const Totals& t, Slope<T>* slopes) {
  const double count = a.elements();
  for (int64_t g = 0; g < a.heads; ++g) {
    slopes[g] = {T(1), T(1), T(0), T(0), T(0)};
    if (a.norm != Norm::kBatch) continue;
    slopes[g].factor = static_cast<T>(a.weight[g] / a.std[g]), slopes[g].inverse = static_cast<T>(1 / a.std[g]), slopes[g].mean = static_cast<T>(a.mean[g]);
    if (a.live) slopes[g].mean_y = static_cast<T>(t.y[g] / count), slopes[g].mean_yx = static_cast<T>(hat_product(a, t, g) / count);
  }
}

// The gradients of the mix and the norm, from the totals.
inline void finish_small(const Backward& a, const Totals& t) {
  const int64_t heads = a.heads;
  const double count = a.elements();
  for (int64_t g = 0; g < heads; ++g) {
    const double factor = a.norm == Norm::kBatch ? a.weight[g] / a.std[g] : 1, along = a.norm == Norm::kBatch ? hat_product(a, t, g) : t.weight[g];
    for (int64_t h = 0; h < heads; ++h) {
      double z = t.yx[g * heads + h];
      if (a.norm == Norm::kBatch && a.live) {
        // sum dZ_g is zero, so that the maps may be the centred ones.
        double hat = -a.mean[g] * t.x[h];
        for (int64_t f = 0; f < heads; ++f) hat += a.mix[g * heads + f] * t.xx[f * heads + h];
        z -= t.y[g] / count * t.x[h] + along / count * hat / a.std[g];
      } else {
        z += a.centre * t.y[g];
      }
      a.grad_mix[g * heads + h] = factor * z;
    }
    a.grad_bias[g] = a.norm == Norm::kBatch && a.live ? 0 : factor * t.y[g];
    a.grad_weight[g] = a.norm == Norm::kNone ? 0 : along;
    a.grad_constant[g] = a.norm == Norm::kLayer ? t.constant[g] : t.y[g];
  }
}

template <class T, class P>
class BackwardPasses {
 public:
  explicit BackwardPasses(const Backward& a)
      : a_(a), n_(a), io_(storage_of<T>(a.dtype)), mixing_(a), rows_(tile_rows(n_)), tiles_(ceil_div(n_.tokens, rows_)),
        parts_(max_of<int64_t>(min_of(num_threads(), tiles_), 1)), totals_memory_(Totals::size(n_.heads)), totals_(totals_memory_, n_.heads) {}

  void run() {
    std::memset(totals_memory_.get(), 0, static_cast<size_t>(Totals::size(n_.heads)) * sizeof(double));
    const P products{io_, n_};
    Sample<T, P> sample(a_, n_, products);
    for (int64_t b = 0; a_.live && b < a_.batch; ++b) {
      sample.load(b);
      sum(sample, b);
    }
    make_slopes(a_, totals_, slopes_);
    for (int64_t b = 0; b < a_.batch; ++b) {
      if (!a_.live || a_.batch > 1) sample.load(b);
      differentiate(sample, b);
    }
    finish_small(a_, totals_);
  }

 private:
  static int64_t tile_rows(const Sizes<T>& n) {
    const int64_t bytes = 2 * n.heads * n.map_row * static_cast<int64_t>(sizeof(T));
    return max_of(min_of(kBackwardBytes / max_of<int64_t>(bytes, 1), kMostRows) / kBlockRows * kBlockRows, int64_t{kBlockRows});
  }

  // body(tile, its number, first row, rows, totals) for every tile of one part of the queries after the other; the totals are added in their order.
  template <class Body>
  void for_parts(const Body& body) {
    const int64_t size = Totals::size(n_.heads);
    Buffer<double> sums(tiles_ * size);
    std::memset(sums.get(), 0, static_cast<size_t>(tiles_ * size) * sizeof(double));
    parallel(parts_, [&](int64_t part) {
      BackwardTile<T> tile(a_, n_, mixing_, rows_);
      const Range range = share(tiles_, part, parts_);
      for (int64_t t = range.begin; t < range.end; ++t) {
        Totals totals(sums + t * size, n_.heads);
        body(tile, part, t * rows_, min_of(rows_, n_.tokens - t * rows_), totals);
      }
    });
    for (int64_t t = 0; t < tiles_; ++t) {
      for (int64_t i = 0; i < size; ++i) totals_memory_[i] += sums[t * size + i];
    }
  }

  void sum(const Sample<T, P>& sample, int64_t b) {
    for_parts([&](BackwardTile<T>& tile, int64_t, int64_t first, int64_t rows, Totals& totals) {
      tile.fill(sample, b, first, rows);
      tile.sum(rows, totals);
    });
  }

  // Parts of the queries, each with its own dK and dV, summed in their order.
  void differentiate(const Sample<T, P>& s, int64_t b) {
    const int64_t k_size = n_.heads * n_.tokens * n_.dim_row, v_size = n_.heads * n_.tokens * n_.value_row;
    Buffer<T> grad_k(parts_ * k_size), grad_v(parts_ * v_size);
    std::memset(grad_k.get(), 0, static_cast<size_t>(parts_ * k_size) * sizeof(T));
    std::memset(grad_v.get(), 0, static_cast<size_t>(parts_ * v_size) * sizeof(T));
    for_parts([&](BackwardTile<T>& tile, int64_t part, int64_t first, int64_t rows, Totals& totals) {
      tile.fill(s, b, first, rows);
      tile.differentiate(rows, slopes_, totals);
      for (int64_t h = 0; h < n_.heads; ++h) {
        products(s, b, h, first, rows, tile, grad_k + part * k_size + h * n_.tokens * n_.dim_row, grad_v + part * v_size + h * n_.tokens * n_.value_row);
      }
    });
    parallel(n_.heads, [&](int64_t h) {
      T *k = grad_k + h * n_.tokens * n_.dim_row, *v = grad_v + h * n_.tokens * n_.value_row;
      for (int64_t p = 1; p < parts_; ++p) {
        for (int64_t i = 0; i < n_.tokens * n_.dim_row; ++i) k[i] += k[p * k_size + i];
        for (int64_t i = 0; i < n_.tokens * n_.value_row; ++i) v[i] += v[p * v_size + i];
      }
      add_constant(s, h, v);
      put(a_.grad_k, b, h, 0, n_.tokens, n_.dim, k, n_.dim_row);
      put(a_.grad_v, b, h, 0, n_.tokens, n_.value_dim, v, n_.value_row);
    });
  }

  // dQ of the tile's queries, and what they add to dK and dV.
  void products(const Sample<T, P>& s, int64_t b, int64_t h, int64_t first, int64_t rows, BackwardTile<T>& tile, T* grad_k, T* grad_v) const {
    constexpr int64_t lanes = kLanes<T>;
    const T scale = static_cast<T>(a_.scale);
    if (a_.grad_q) {
      Buffer<T> grad_q(rows * n_.dim_row);
      for_keys(n_.tokens, [&](int64_t j, int64_t keys) {
        const T *grads = tile.grads(h) + j, *k = s.keys(h) + j * n_.dim_row;
        gemm<T>(rows, keys, n_.dim_row / lanes, grads, n_.map_row, 1, k, n_.dim_row, [&](int64_t i, int64_t c, Vec<T> acc) {
          T* at = grad_q + i * n_.dim_row + c * lanes;
          store(at, j == 0 ? acc * scale : load(at) + acc * scale);
        });
      });
      put(a_.grad_q, b, h, first, rows, n_.dim, grad_q, n_.dim_row);
    }
    if (a_.grad_k) {
      gemm<T>(n_.tokens, rows, n_.dim_row / lanes, tile.grads(h), 1, n_.map_row, s.queries(h, first), n_.dim_row, [&](int64_t i, int64_t c, Vec<T> acc) {
        T* at = grad_k + i * n_.dim_row + c * lanes;
        store(at, load(at) + acc * scale);
      });
    }
    if (a_.grad_v) {
      gemm<T>(n_.tokens, rows, n_.value_row / lanes, tile.maps(h), 1, n_.map_row, s.grad_out(h, first), n_.value_row, [&](int64_t i, int64_t c, Vec<T> acc) {
        T* at = grad_v + i * n_.value_row + c * lanes;
        store(at, load(at) + acc);
      });
    }
  }

  // What every element of the mixed maps has in common reaches every row of dV alike.
  void add_constant(const Sample<T, P>& s, int64_t head, T* grad_v) const {
    const T constant = mixing_.constant[head];
    if (constant == 0) return;
    Buffer<T> sums(n_.value_row);
    std::memset(sums.get(), 0, static_cast<size_t>(n_.value_row) * sizeof(T));
    for (int64_t i = 0; i < n_.tokens; ++i) {
      for (int64_t c = 0; c < n_.value_row; ++c) sums[c] += s.grad_out(head, i)[c];
    }
    for (int64_t j = 0; j < n_.tokens; ++j) {
      for (int64_t c = 0; c < n_.value_row; ++c) grad_v[j * n_.value_row + c] += constant * sums[c];
    }
  }

  void put(void* grad, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns, const T* from, int64_t from_row) const {
    if (!grad) return;
    void* target = static_cast<char*>(grad) + ((b * n_.heads + h) * n_.tokens + row) * columns * io_.bytes;
    io_.store_rows({target, columns * io_.bytes, 1}, rows, columns, from, from_row);
  }

  const Backward& a_;
  const Sizes<T> n_;
  const Storage<T>& io_;
  const Mixing<T> mixing_;
  const int64_t rows_, tiles_, parts_;
  Buffer<double> totals_memory_;
  Totals totals_;
  Slope<T> slopes_[kMostHeads];
};

template <class T, class P>
void backward_with(const Backward& a) { BackwardPasses<T, P>(a).run(); }

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
