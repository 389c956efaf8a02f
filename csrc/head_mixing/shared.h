// What Re-Attention's passes share: one sample's keys and values packed for all heads, tiles of maps of all heads, and the mix across them.
#pragma once

#include <cmath>

#include "common/heads.h"
#include "common/philox.h"
#include "head_mixing/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace head_mixing;

constexpr int64_t kMostHeads = 64;
// The maps of a tile, all heads of some rows, stay in the L2 cache.
constexpr int64_t kTileBytes = 512 << 10;
constexpr int64_t kMostRows = 32;
// Mixed maps have both signs: what one chain of sums over all keys rounds off would be twice what the blocked sums of a matrix product do.
constexpr int64_t kMostKeys = 256;

// body(first key, keys) for parts of all keys, even ones; once if there is none.
template <class Body>
inline void for_keys(int64_t tokens, const Body& body) {
  const int64_t keys = max_of<int64_t>(ceil_div(tokens, max_of<int64_t>(ceil_div(tokens, kMostKeys), 1)), 1);
  int64_t j = 0;
  do {
    body(j, min_of(keys, tokens - j));
    j += keys;
  } while (j < tokens);
}

template <class T>
struct Sizes {
  static constexpr int64_t lanes = kLanes<T>;
  const int64_t heads, queries, tokens, dim, value_dim, dim_row, value_row, map_row, rows;

  explicit Sizes(const Attention& a)
      : heads(a.heads), queries(a.queries), tokens(a.keys), dim(a.dim), value_dim(a.value_dim), dim_row(round_up(dim, lanes)), value_row(round_up(value_dim, lanes)),
        map_row(round_up(tokens, kPanel<T>)),
        rows(round_up(max_of<int64_t>(min_of(kTileBytes / max_of<int64_t>(heads * map_row * static_cast<int64_t>(sizeof(T)), 1), min_of(kMostRows, queries)), 1), kBlockRows)) {}

  int64_t tiles() const { return ceil_div(queries, rows); }
  // What the maps of one head, `count` rows, take of a tile's. The mix reads and writes one place of all heads at a time: were they a multiple of 4096 bytes apart,
  // as 32 rows of 224 are, they would all fall into one set of the L1 cache.
  int64_t head_size(int64_t count) const { return count * map_row + kPanel<T>; }
};

// The products of a tile in the arithmetic type: of rows of q or dO with all rows of k or v (`left` with `panels`), and of mixed maps with v.
template <class T>
struct Plain {
  static constexpr bool kLeftIsRows = true;  // a left operand is nothing but rows in the arithmetic type
  const Storage<T>& io;
  const Sizes<T>& n;

  int64_t left_row(int64_t dim) const { return round_up(dim, kLanes<T>); }
  int64_t panels_size(int64_t dim) const { return n.map_row * dim; }
  int64_t values_size() const { return n.tokens * round_up(n.value_row, kPanel<T>); }
  int64_t mixed_size() const { return 0; }

  void pack_left(const HeadRows& from, int64_t rows, int64_t dim, T* left) const { io.load_rows(from, rows, dim, left, left_row(dim)); }
  void pack_panels(const HeadRows& from, int64_t dim, T* panels) const {
    pack_transposed(io, from, n.tokens, dim, [](T*, int64_t) {}, panels);
  }
  void pack_values(const HeadRows& v, T* values) const {
    for (int64_t c = 0; c < n.value_dim; c += kPanel<T>) {
      io.load_rows(v.from_column(c * io.bytes), n.tokens, min_of(n.value_dim - c, kPanel<T>), values + c * n.tokens, kPanel<T>);
    }
  }
  template <class Epilogue>
  void product(int64_t rows, int64_t dim, const T* left, const T* panels, const Epilogue& epilogue) const {
    gemm_panels<T>(rows, dim, ceil_div(n.tokens, kLanes<T>), left, left_row(dim), 1, panels, dim * kPanel<T>, epilogue);
  }
  void put(T* maps, T*, int64_t place, Vec<T> v) const { store(maps + place, v); }
  // epilogue(row, vector, sums of some keys, whether they are the first).
  template <class Epilogue>
  void out(int64_t rows, const T* maps, const T*, const T* values, const Epilogue& epilogue) const {
    for_keys(n.tokens, [&](int64_t j, int64_t keys) {
      gemm_panels<T>(rows, keys, n.value_row / kLanes<T>, maps + j, n.map_row, 1, values + j * kPanel<T>, n.tokens * kPanel<T>,
                     [&](int64_t i, int64_t c, Vec<T> acc) { epilogue(i, c, acc, j == 0); });
    });
  }
};

#if defined(__AVX512BF16__)

// The same with bfloat16 operands and float accumulators; the mixed maps are rounded to bfloat16, as eager does.
struct Pairs {
  static constexpr bool kLeftIsRows = false;
  const Storage<float>& io;
  const Sizes<float>& n;

  int64_t left_row(int64_t dim) const { return round_up(ceil_div(dim, 2), kFloatLanes); }
  int64_t panels_size(int64_t dim) const { return n.map_row * ceil_div(dim, 2); }
  int64_t values_size() const { return ceil_div(n.tokens, 2) * round_up(n.value_row, kPanel<float>); }
  int64_t mixed_size() const { return n.heads * n.head_size(n.rows) / 2; }

  void pack_left(const HeadRows& from, int64_t rows, int64_t dim, float* left) const {
    load_pairs(io, from, rows, dim, true, [](float*, int64_t) {}, left, left_row(dim));
  }
  void pack_panels(const HeadRows& from, int64_t dim, float* panels) const {
    pack_transposed_pairs(io, from, n.tokens, dim, true, [](float*, int64_t) {}, panels);
  }
  void pack_values(const HeadRows& v, float* values) const { pack_row_pairs(v, n.tokens, n.value_dim, values); }
  template <class Epilogue>
  void product(int64_t rows, int64_t dim, const float* left, const float* panels, const Epilogue& epilogue) const {
    const int64_t pairs = ceil_div(dim, 2);
    gemm_pairs(rows, pairs, ceil_div(n.tokens, kFloatLanes), left, 2 * left_row(dim), panels, pairs * kPanel<float>, epilogue);
  }
  void put(float*, float* mixed, int64_t place, Vec<float> v) const { store_bfloat16(mixed, place, v); }
  template <class Epilogue>
  void out(int64_t rows, const float*, const float* mixed, const float* values, const Epilogue& epilogue) const {
    gemm_pairs(rows, ceil_div(n.tokens, 2), n.value_row / kFloatLanes, mixed, n.map_row, values, ceil_div(n.tokens, 2) * kPanel<float>,
               [&](int64_t i, int64_t c, Vec<float> acc) { epilogue(i, c, acc, true); });
  }
};

#endif  // __AVX512BF16__

// Multiplies rows of maps by 0 or keep_factor: queries [first, first + rows), keys [first_key, first_key + count) of a sample.
template <class T>
inline void drop_rows(
    const Attention& a, int64_t sample, int64_t head, int64_t first, int64_t rows, T* maps, int64_t row, int64_t first_key, int64_t count) {
  const T factor = static_cast<T>(a.keep_factor);
  const int64_t query = sample * a.queries + first, key = sample * a.keys + first_key;
  for (int64_t group = query / 4; group * 4 < query + rows; ++group) {
    for (int64_t j = 0; j < count; j += kPhiloxLanes) {
      PhiloxWords words;
      for (int c = 0; c < kPhiloxLanes; ++c) {
        words[0][c] = static_cast<uint32_t>(key + j) + static_cast<uint32_t>(c), words[1][c] = static_cast<uint32_t>(group);
        words[2][c] = static_cast<uint32_t>(head), words[3][c] = 0;
      }
      philox(a.seed, words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t i = group * 4 + w - query;
        if (i < 0 || i >= rows) continue;
        for (int64_t c = 0; c < min_of<int64_t>(row - j, kPhiloxLanes); ++c) maps[i * row + j + c] *= words[w][c] > a.drop_limit ? factor : T(0);
      }
    }
  }
}

// Logits [rows][map_row] of one head to exp(logit - largest), zero beyond the last key; inverse[i] is 1 / their sum, lse[i] the logsumexp, where
// that is wanted.
template <class T>
inline void softmax_rows(const Sizes<T>& n, int64_t rows, T* maps, T* inverse, double* lse) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole = n.tokens / lanes * lanes, left = n.tokens - whole;
  for (int64_t i = 0; i < rows; ++i) {
    T* at = maps + i * n.map_row;
    Vec<T> most[2] = {broadcast(-kInfinity<T>), broadcast(-kInfinity<T>)};
    int64_t c = 0;
    for (; c + 2 * lanes <= whole; c += 2 * lanes) most[0] = max_vec(most[0], load(at + c)), most[1] = max_vec(most[1], load(at + c + lanes));
    for (; c < whole; c += lanes) most[0] = max_vec(most[0], load(at + c));
    if (left) most[1] = max_vec(most[1], first_lanes<T>(load(at + whole), left, -kInfinity<T>));
    const T largest = reduce_max<T>(max_vec(most[0], most[1]));
    Vec<T> sums[2] = {};
    for (c = 0; c + 2 * lanes <= whole; c += 2 * lanes) {
#pragma GCC unroll 2
      for (int64_t u = 0; u < 2; ++u) {
        const Vec<T> p = exp_nonpositive(load(at + c + u * lanes) - largest);
        sums[u] += p;
        store(at + c + u * lanes, p);
      }
    }
    for (; c < whole; c += lanes) {
      const Vec<T> p = exp_nonpositive(load(at + c) - largest);
      sums[0] += p;
      store(at + c, p);
    }
    if (left) {
      const Vec<T> p = first_lanes<T>(exp_nonpositive(load(at + whole) - largest), left, T(0));
      sums[1] += p;
      store(at + whole, p);
    }
    for (c = round_up(n.tokens, lanes); c < n.map_row; c += lanes) store(at + c, Vec<T>{});
    const T sum = reduce_add<T>(sums[0] + sums[1]);
    inverse[i] = T(1) / sum;
    if (lse) lse[i] = static_cast<double>(largest) + std::log(static_cast<double>(sum));
  }
}

template <class T>
inline T row_sum(const T* at, int64_t row) {
  Vec<T> sum{};
  for (int64_t c = 0; c < row; c += kLanes<T>) sum += load(at + c);
  return reduce_add<T>(sum);
}

// Sums over maps of the products of every pair of heads, a vector each until they are added up; a symmetric one computes half of them.
template <class T>
class PairSums {
 public:
  PairSums(int64_t heads, bool symmetric) : heads_(heads), symmetric_(symmetric), sums_(heads * heads * kLanes<T>) {}

  void clear() { std::memset(sums_.get(), 0, static_cast<size_t>(heads_ * heads_ * kLanes<T>) * sizeof(T)); }

  // A row of every head on the left with one of every head on the right.
  void add_row(const T* left, int64_t left_head, const T* right, int64_t right_head, int64_t row) {
    constexpr int64_t kSide = 4;
    for (int64_t g = 0; g < heads_; g += kSide) {
      for (int64_t h = symmetric_ ? g : 0; h < heads_; h += kSide) {
        const T *a[kSide], *b[kSide];
        for (int64_t u = 0; u < kSide; ++u) a[u] = left + min_of(g + u, heads_ - 1) * left_head, b[u] = right + min_of(h + u, heads_ - 1) * right_head;
        Vec<T> acc[kSide][kSide] = {};
        for (int64_t j = 0; j < row; j += kLanes<T>) {
          Vec<T> columns[kSide];
#pragma GCC unroll 4
          for (int v = 0; v < kSide; ++v) columns[v] = load(b[v] + j);
#pragma GCC unroll 4
          for (int u = 0; u < kSide; ++u) {
            const Vec<T> value = load(a[u] + j);
#pragma GCC unroll 4
            for (int v = 0; v < kSide; ++v) acc[u][v] += value * columns[v];
          }
        }
        for (int64_t u = 0; u < min_of(kSide, heads_ - g); ++u) {
          for (int64_t v = 0; v < min_of(kSide, heads_ - h); ++v) {
            T* at = sums_ + ((g + u) * heads_ + h + v) * kLanes<T>;
            store(at, load(at) + acc[u][v]);
          }
        }
      }
    }
  }

  // Adds them to totals [heads][heads].
  void add_to(double* totals) const {
    for (int64_t g = 0; g < heads_; ++g) {
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t from = symmetric_ && h < g ? h * heads_ + g : g * heads_ + h;
        totals[g * heads_ + h] += static_cast<double>(reduce_add<T>(load(sums_ + from * kLanes<T>)));
      }
    }
  }

 private:
  const int64_t heads_;
  const bool symmetric_;
  Buffer<T> sums_;
};

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
