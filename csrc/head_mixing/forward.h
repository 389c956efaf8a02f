// The forward, and the moments of the maps that a batch norm in training needs before it: for a tile of queries the maps of all heads in cache, mixed in place.
#pragma once

#include "head_mixing/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Of the loop the compiler makes one root after the other, with a branch for errno behind each.
template <class T>
inline Vec<T> square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_sqrt_ps(0xffff, v);  // maskz: gcc 12 warns about the plain one
  } else {
    return _mm512_maskz_sqrt_pd(0xff, v);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_sqrt_ps(v);
  } else {
    return _mm256_sqrt_pd(v);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// z[g] = start[g] + sum_h a[g][h] x[h] for kRows rows of a, two vectors at a time.
template <int kRows, class T>
inline void mix_block(int64_t heads, const T* a, const T* start, const Vec<T> (*x)[2], Vec<T> (*z)[2]) {
  Vec<T> acc[kRows][2];
#pragma GCC unroll 6
  for (int g = 0; g < kRows; ++g) acc[g][0] = acc[g][1] = broadcast(start[g]);
  for (int64_t h = 0; h < heads; ++h) {
    const Vec<T> first = x[h][0], second = x[h][1];
#pragma GCC unroll 6
    for (int g = 0; g < kRows; ++g) {
      const Vec<T> c = broadcast(a[g * heads + h]);
      acc[g][0] += c * first;
      acc[g][1] += c * second;
    }
  }
#pragma GCC unroll 6
  for (int g = 0; g < kRows; ++g) z[g][0] = acc[g][0], z[g][1] = acc[g][1];
}

template <class T>
inline void mix(int64_t heads, const T* a, const T* start, const Vec<T> (*x)[2], Vec<T> (*z)[2]) {
  int64_t g = 0;
  for (; g + 6 <= heads; g += 6) mix_block<6>(heads, a + g * heads, start + g, x, z + g);
  for (; g + 2 <= heads; g += 2) mix_block<2>(heads, a + g * heads, start + g, x, z + g);
  if (g < heads) mix_block<1>(heads, a + g * heads, start + g, x, z + g);
}

// The small matrices in the arithmetic type. Before a layer norm their columns are centred: what is mixed by them has a mean of zero over the heads, and the norm
// has none to find and to subtract.
template <class T>
struct Mixing {
  T mix[kMostHeads * kMostHeads], start[kMostHeads], weight[kMostHeads], constant[kMostHeads];

  explicit Mixing(const Attention& a) {
    const bool centred = a.norm == Norm::kLayer;
    const auto mean = [&](const double* column, int64_t stride) {
      double sum = 0;
      for (int64_t g = 0; g < a.heads; ++g) sum += column[g * stride];
      return centred ? sum / static_cast<double>(a.heads) : 0;
    };
    for (int64_t h = 0; h < a.heads; ++h) {
      const double of_column = mean(a.mix + h, a.heads);
      for (int64_t g = 0; g < a.heads; ++g) mix[g * a.heads + h] = static_cast<T>(a.mix[g * a.heads + h] - of_column);
    }
    const double of_bias = mean(a.mix_bias, 1);
    for (int64_t g = 0; g < a.heads; ++g) {
      start[g] = centred ? static_cast<T>(a.mix_bias[g] - of_bias) : T(0);
      weight[g] = static_cast<T>(a.weight[g]), constant[g] = static_cast<T>(a.constant[g]);
    }
  }
};

template <class T, class P>
class Tile {
 public:
  Tile(const Attention& a, const Sizes<T>& n, const P& products, const Mixing<T>& mixing)
      : a_(a), n_(n), io_(storage_of<T>(a.dtype)), products_(products), mixing_(mixing), head_size_(n.head_size(n.rows)), queries_(n.rows * products.left_row(n.dim)),
        maps_(n.heads * head_size_), mixed_(products.mixed_size()), inverse_(n.heads * n.rows), out_(n.rows * n.value_row) {}

  // The maps of all heads, dropped but not yet divided by their sums.
  void maps(int64_t sample, int64_t first, int64_t rows, const T* keys, double* lse) {
    const T scale = static_cast<T>(a_.scale);
    for (int64_t h = 0; h < n_.heads; ++h) {
      T* at = maps_ + h * head_size_;
      products_.pack_left(head_rows(io_, a_.q, sample, h, first), rows, n_.dim, queries_);
      products_.product(rows, n_.dim, queries_, keys + h * products_.panels_size(n_.dim), [&](int64_t i, int64_t c, Vec<T> acc) {
        store(at + i * n_.map_row + c * kLanes<T>, acc * scale);
      });
      softmax_rows<T>(n_, rows, at, inverse_ + h * n_.rows, lse ? lse + (sample * n_.heads + h) * n_.queries + first : nullptr);
      if (a_.dropout) drop_rows<T>(a_, sample, h, first, rows, at, n_.map_row, 0, n_.tokens);
    }
  }

  // Two vectors of every head, divided and centred.
  void load_maps(int64_t i, int64_t j, Vec<T> (*x)[2]) const {
    const Vec<T> centre = broadcast(static_cast<T>(a_.centre));
    for (int64_t h = 0; h < n_.heads; ++h) {
      const T* at = maps_ + h * head_size_ + i * n_.map_row + j;
      const T inverse = inverse_[h * n_.rows + i];
      x[h][0] = load(at) * inverse - centre;
      x[h][1] = load(at + kLanes<T>) * inverse - centre;
    }
  }

  void mix_rows(int64_t rows) {
    if (n_.heads <= 4) return mix_in_registers<4>(rows);
    if (n_.heads <= 8) return mix_in_registers<8>(rows);
    if (n_.heads <= 12) return mix_in_registers<12>(rows);
    if (n_.heads <= 16 && kBlockRows >= 8) return mix_in_registers<16>(rows);
    Vec<T> x[kMostHeads][2], z[kMostHeads][2];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n_.map_row; j += kPanel<T>) {
        load_maps(i, j, x);
        mix<T>(n_.heads, mixing_.mix, mixing_.start, x, z);
        for (int u = 0; u < 2; ++u) {
          if (a_.norm == Norm::kLayer) {
            Vec<T> squares{};
            for (int64_t g = 0; g < n_.heads; ++g) squares += z[g][u] * z[g][u];
            const Vec<T> inverse = inverse_deviation(squares);
            for (int64_t g = 0; g < n_.heads; ++g) z[g][u] *= inverse * mixing_.weight[g];
          }
          for (int64_t g = 0; g < n_.heads; ++g) products_.put(maps_, mixed_, g * head_size_ + i * n_.map_row + j + u * kLanes<T>, z[g][u]);
        }
      }
    }
  }

  void apply(int64_t sample, int64_t first, int64_t rows, const T* values, const T* column_sums, void* out) {
    for (int64_t g = 0; g < n_.heads; ++g) {
      const int64_t at = g * head_size_;
      const T constant = mixing_.constant[g];
      const T* sums = column_sums + g * n_.value_row;
      products_.out(rows, maps_ + at, mixed_ + at / 2, values + g * products_.values_size(), [&](int64_t i, int64_t c, Vec<T> acc, bool first) {
        T* target = out_ + i * n_.value_row + c * kLanes<T>;
        store(target, acc + (first ? load(sums + c * kLanes<T>) * constant : load(target)));
      });
      const int64_t row = n_.heads * n_.value_dim;
      void* target = static_cast<char*>(out) + ((sample * n_.queries + first) * row + g * n_.value_dim) * io_.bytes;
      io_.store_rows({target, row * io_.bytes, 1}, rows, n_.value_dim, out_, n_.value_row);
    }
  }

  // Adds the tile's sums [heads] and products [heads][heads].
  void moments(int64_t rows, double* sums, double* products) {
    Vec<T> x[kMostHeads][2];
    Buffer<T> row(n_.heads * n_.map_row);
    PairSums<T> pairs(n_.heads, true);
    pairs.clear();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n_.map_row; j += kPanel<T>) {
        load_maps(i, j, x);
        for (int64_t h = 0; h < n_.heads; ++h) {
          for (int u = 0; u < 2; ++u) {
            const int64_t place = j + u * kLanes<T>;
            store(row + h * n_.map_row + place, first_lanes<T>(x[h][u], n_.tokens - place, T(0)));
          }
        }
      }
      pairs.add_row(row, n_.map_row, row, n_.map_row, n_.map_row);
      for (int64_t h = 0; h < n_.heads; ++h) sums[h] += static_cast<double>(row_sum(row + h * n_.map_row, n_.map_row));
    }
    pairs.add_to(products);
  }

 private:
  // The mix of up to kHeads heads, a vector at a time: the mixed maps stay in registers until they are normed. What the loops use is local: of a member the
  // compiler has to expect that a store has changed it.
  template <int kHeads>
  void mix_in_registers(int64_t rows) {
    T columns[kHeads][kHeads] = {}, start[kHeads] = {}, weight[kHeads] = {};  // columns: of the mix, [in][out]
    const int64_t heads = n_.heads, tokens = n_.tokens, map_row = n_.map_row, head_size = head_size_, inverse_row = n_.rows;
    for (int64_t g = 0; g < heads; ++g) {
      start[g] = mixing_.start[g], weight[g] = mixing_.weight[g];
      for (int64_t h = 0; h < heads; ++h) columns[h][g] = mixing_.mix[g * heads + h];
    }
    T *maps = maps_, *mixed = mixed_;
    const T* inverses = inverse_;
    const P& products = products_;
    const bool layer = a_.norm == Norm::kLayer;
    const Vec<T> centre = broadcast(static_cast<T>(a_.centre));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < tokens; j += kLanes<T>) {
        Vec<T> z[kHeads];
#pragma GCC unroll 16
        for (int g = 0; g < kHeads; ++g) z[g] = broadcast(start[g]);
        const int64_t place = i * map_row + j;
        for (int64_t h = 0; h < heads; ++h) {
          const Vec<T> x = load(maps + h * head_size + place) * inverses[h * inverse_row + i] - centre;
#pragma GCC unroll 16
          for (int g = 0; g < kHeads; ++g) z[g] += columns[h][g] * x;
        }
        if (layer) {
          Vec<T> squares[2] = {};
#pragma GCC unroll 16
          for (int g = 0; g < kHeads; ++g) squares[g % 2] += z[g] * z[g];
          const Vec<T> inverse = inverse_deviation(squares[0] + squares[1]);
#pragma GCC unroll 16
          for (int g = 0; g < kHeads; ++g) z[g] *= inverse * weight[g];
        }
#pragma GCC unroll 16
        for (int g = 0; g < kHeads; ++g) {
          if (g < heads) products.put(maps, mixed, g * head_size + place, z[g]);
        }
      }
    }
  }

  // Of a layer norm, from the sum over the heads of the squares.
  Vec<T> inverse_deviation(Vec<T> squares) const { return T(1) / square_root<T>(squares * (T(1) / static_cast<T>(n_.heads)) + static_cast<T>(a_.eps)); }

  const Attention& a_;
  const Sizes<T>& n_;
  const Storage<T>& io_;
  const P& products_;
  const Mixing<T>& mixing_;
  const int64_t head_size_;
  Buffer<T> queries_, maps_, mixed_, inverse_, out_;
};

// body(tile, sample, first row, rows, packed keys, packed values, column sums of V, index of the tile) for every tile; some samples at a time are packed, all heads.
template <class T, class P, class Body>
void for_tiles(const Attention& a, const Sizes<T>& n, bool need_values, const Body& body) {
  const Storage<T>& io = storage_of<T>(a.dtype);
  const P products{io, n};
  const Mixing<T> mixing(a);
  // As many samples as give every thread a few tiles.
  const int64_t threads = num_threads(), together = min_of(max_of<int64_t>(ceil_div(4 * threads, max_of<int64_t>(n.tiles(), 1)), 1), a.batch);
  const int64_t keys_size = products.panels_size(n.dim);
  Buffer<T> keys(together * n.heads * keys_size), values(need_values ? together * n.heads * products.values_size() : 0);
  Buffer<T> sums(need_values ? together * n.heads * n.value_row : 0);
  for (int64_t first = 0; first < a.batch; first += together) {
    const int64_t samples = min_of(together, a.batch - first);
    parallel(samples * n.heads, [&](int64_t i) {
      const int64_t sample = first + i / n.heads, head = i % n.heads;
      products.pack_panels(head_rows(io, a.k, sample, head), n.dim, keys + i * keys_size);
      if (!need_values) return;
      products.pack_values(head_rows(io, a.v, sample, head), values + i * products.values_size());
      column_sums(io, n, head_rows(io, a.v, sample, head), sums + i * n.value_row);
    });
    int64_t next = 0;
    const int64_t tiles = samples * n.tiles();
    parallel(min_of(threads, tiles), [&](int64_t) {
      Tile<T, P> tile(a, n, products, mixing);
      for (;;) {
        const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (t >= tiles) return;
        const int64_t i = t / n.tiles(), row = t % n.tiles() * n.rows, at = i * n.heads;
        body(tile, first + i, row, min_of(n.rows, n.queries - row), keys + at * keys_size, values + at * products.values_size(), sums + at * n.value_row, first * n.tiles() + t);
      }
    });
  }
}

template <class T>
void column_sums(const Storage<T>& io, const Sizes<T>& n, const HeadRows& v, T* sums) {
  Buffer<T> rows(kRowsTogether * n.value_row);
  std::memset(sums, 0, static_cast<size_t>(n.value_row) * sizeof(T));
  for (int64_t j = 0; j < n.tokens; j += kRowsTogether) {
    const int64_t count = min_of(kRowsTogether, n.tokens - j);
    io.load_rows(v.after(j), count, n.value_dim, rows, n.value_row);
    for (int64_t c = 0; c < n.value_row; c += kLanes<T>) {
      Vec<T> sum = load(sums + c);
      for (int64_t i = 0; i < count; ++i) sum += load(rows + i * n.value_row + c);
      store(sums + c, sum);
    }
  }
}

template <class T, class P>
void forward_with(const Forward& a) {
  const Sizes<T> n(a);
  for_tiles<T, P>(a, n, true, [&](Tile<T, P>& tile, int64_t sample, int64_t first, int64_t rows, const T* keys, const T* values, const T* sums, int64_t) {
    tile.maps(sample, first, rows, keys, a.lse);
    tile.mix_rows(rows);
    tile.apply(sample, first, rows, values, sums, a.out);
  });
}

template <class T, class P>
void moments_with(const Moments& a) {
  const Sizes<T> n(a);
  const int64_t size = n.heads * (n.heads + 1), tiles = a.batch * n.tiles();
  Buffer<double> parts(tiles * size);
  std::memset(parts.get(), 0, static_cast<size_t>(tiles * size) * sizeof(double));
  for_tiles<T, P>(a, n, false, [&](Tile<T, P>& tile, int64_t sample, int64_t first, int64_t rows, const T* keys, const T*, const T*, int64_t index) {
    tile.maps(sample, first, rows, keys, a.lse);
    tile.moments(rows, parts + index * size, parts + index * size + n.heads);
  });
  for (int64_t t = 0; t < tiles; ++t) {
    const double* part = parts + t * size;
    for (int64_t h = 0; h < n.heads; ++h) a.sums[h] += part[h];
    for (int64_t i = 0; i < n.heads * n.heads; ++i) a.products[i] += part[n.heads + i];
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
