// What both directions of separable self-attention use: tiles and groups of tokens, the weights, the context.
#pragma once

#include "common/gemm.h"
#include "common/tile.h"
#include "separable/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace separable;

// Tokens of a forward tile, whatever the width of a vector, so that sums over tiles have the same length on every instruction set. With AVX-512 it is two
// vectors of float: the widest block that gemm() holds in registers.
constexpr int64_t kForwardTile = 32;
template <class T>
constexpr int kForwardVectors = kForwardTile / kLanes<T>;
// Forward tiles read and written together (see load_panels).
constexpr int64_t kTilesPerStep = 4;

// Below this many multiply-adds a fork and join costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;

template <class T>
void zero(T* data, int64_t count) { std::memset(data, 0, static_cast<size_t>(count) * sizeof(T)); }

#if defined(__AVX512BF16__)
template <class S>
constexpr bool kBFloat16Dots = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool kBFloat16Dots = false;
#endif

template <class S>
Tokens<S> tokens_of(const Map& map, const SelfAttention& a, int64_t sample) {
  return {static_cast<S*>(map.data) + sample * map.batch_stride, a.dim, a.height, a.width, map.dim_stride, map.height_stride, map.width_stride};
}

// Which group each token of a sample belongs to.
class Groups {
 public:
  Groups(const SelfAttention& a, int64_t padded) : count(a.patch_h * a.patch_w), id_(padded) {
    int32_t* id = id_;
    for (int64_t h = 0; h < a.height; ++h) {
      const int64_t row = h % a.patch_h * a.patch_w;
      for (int64_t w = 0, position = 0; w < a.width; ++w, position = position + 1 == a.patch_w ? 0 : position + 1) {
        *id++ = static_cast<int32_t>(row + position);
      }
    }
    const int32_t last = padded > 0 && id != id_ ? id[-1] : 0;
    while (id != id_ + padded) *id++ = last;  // the padding joins a group that is there anyway; its weights are zero
  }
  const int32_t* at(int64_t token) const { return id_ + token; }

  const int64_t count;

 private:
  Buffer<int32_t> id_;
};

// Looks up a per-group value for each lane of a tile's vectors: a broadcast where the vector lies in one group, a register shuffle where the groups fit in a
// vector, else one lane at a time.
template <class T, int kVectors>
class GroupLookup {
 public:
  GroupLookup(const int32_t* ids, int64_t groups) : ids_(ids), in_register_(groups <= kLanes<T>) {
    for (int j = 0; j < kVectors; ++j) {
      uniform_[j] = true;
      for (int i = 0; i < kLanes<T>; ++i) {
        index_[j][i] = ids[j * kLanes<T> + i];
        uniform_[j] = uniform_[j] && ids[j * kLanes<T> + i] == ids[j * kLanes<T>];
      }
    }
  }
  // A row holds the groups' values, padded to whole vectors.
  Vec<T> operator()(const T* row, int j) const {
    if (uniform_[j]) return broadcast(row[ids_[j * kLanes<T>]]);
    if (in_register_) return shuffle(load(row), index_[j]);
    Vec<T> values;
    for (int i = 0; i < kLanes<T>; ++i) values[i] = row[ids_[j * kLanes<T> + i]];
    return values;
  }
 private:
  const int32_t* ids_;
  IndexVec<T> index_[kVectors];
  bool uniform_[kVectors];
  const bool in_register_;
};

// The lanes of v that belong to a group; `other` in the rest.
template <class T>
inline Vec<T> only_group(Vec<T> v, const int32_t* ids, int32_t group, T other) {
#pragma GCC unroll 64
  for (int i = 0; i < kLanes<T>; ++i) v[i] = ids[i] == group ? v[i] : other;
  return v;
}

// The distinct groups of a tile, in order of appearance.
struct Present {
  Present(const int32_t* ids, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      bool seen = false;
      for (int i = 0; i < count && !seen; ++i) seen = group[i] == ids[t];
      if (!seen) group[count++] = ids[t];
    }
  }
  int count = 0;
  int32_t group[64];
};

// out[token] = row . panel[:, token] + bias for a tile of kVectors vectors: four steps of depth at a time, since one row alone would wait for the adder.
template <int kVectors, class T>
inline void row_times_panel(const T* row, const T* panel, int64_t depth, T bias, T* out) {
  constexpr int64_t columns = kVectors * kLanes<T>;
  Vec<T> acc[4][kVectors] = {};
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[u][j] += broadcast(row[k + u]) * load(panel + (k + u) * columns + j * kLanes<T>);
    }
  }
  for (; k < depth; ++k) {
    for (int j = 0; j < kVectors; ++j) acc[0][j] += broadcast(row[k]) * load(panel + k * columns + j * kLanes<T>);
  }
  for (int j = 0; j < kVectors; ++j) store(out + j * kLanes<T>, (acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j]) + bias);
}

#if defined(__AVX512BF16__)

// Rows 2k and 2k + 1 of a float panel as the pairs gemm_bf16() reads.
inline void pair_panel(const float* panel, int64_t rows, int64_t columns, uint32_t* pairs) {
  for (int64_t k = 0; k < rows / 2; ++k) {
    for (int64_t t = 0; t < columns; t += kFloatLanes) {
      const WordBits low = round_to_bfloat16(load(panel + 2 * k * columns + t)), high = round_to_bfloat16(load(panel + (2 * k + 1) * columns + t));
      store<uint32_t>(pairs + k * columns + t, (low >> 16) | (high & 0xffff0000u));
    }
  }
}

// A float panel rounded to plain bfloat16, same layout.
inline void round_panel(const float* panel, int64_t count, BFloat16* rounded) {
  for (int64_t i = 0; i < count; i += kFloatLanes) store(rounded + i, load(panel + i));
}

// The transpose of a bfloat16 weight [dim][dim].
inline void transpose_weight(const BFloat16* weight, int64_t dim, BFloat16* transposed) {
  const Tokens<BFloat16> columns{const_cast<BFloat16*>(weight), dim, 1, dim, 1, 0, dim};
  parallel(ceil_div(dim, kFloatLanes), [&](int64_t i) {
    Buffer<float> panel(dim * kFloatLanes);
    const int64_t first = i * kFloatLanes, count = min_of<int64_t>(kFloatLanes, dim - first);
    load_panels(columns, first, count, panel.get(), kFloatLanes);
    for (int64_t c = 0; c < dim; ++c) {
      for (int64_t r = 0; r < count; ++r) transposed[c * dim + first + r] = from_float<BFloat16>(panel[c * kFloatLanes + r]);
    }
  });
}

#endif  // __AVX512BF16__

// context = W_k pooled + b_k mass, laid out as a row of groups per channel (what GroupLookup reads).
// Dot products of 4 rows of W_k with the pooled vectors of 4 groups at a time.
template <class S>
void context_rows(
    const S* key_weight, const Arith<S>* key_bias, const Arith<S>* pooled, const Arith<S>* mass, int64_t groups, int64_t dim, Range rows, Arith<S>* context,
    int64_t row_stride) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole = dim / lanes * lanes;
  for (int64_t o = rows.begin; o < rows.end; o += 4) {
    const int64_t no = min_of<int64_t>(4, rows.end - o);
    for (int64_t g = 0; g < groups; g += 4) {
      const int64_t ng = min_of<int64_t>(4, groups - g);
      Vec<T> acc[4][4] = {};
      const S* w[4];
      const T* v[4];
      for (int i = 0; i < 4; ++i) {  // repeat the last row or group instead of branching
        w[i] = key_weight + (o + min_of<int64_t>(i, no - 1)) * dim;
        v[i] = pooled + (g + min_of<int64_t>(i, ng - 1)) * dim;
      }
      for (int64_t c = 0; c < whole; c += lanes) {
        Vec<T> columns[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) columns[j] = load(v[j] + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec<T> row = load(w[i] + c);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) acc[i][j] += row * columns[j];
        }
      }
      for (int64_t i = 0; i < no; ++i) {
        for (int64_t j = 0; j < ng; ++j) {
          T sum = reduce_add<T>(acc[i][j]);
          for (int64_t c = whole; c < dim; ++c) sum += to_float(w[i][c]) * v[j][c];
          context[(o + i) * row_stride + g + j] = sum + key_bias[o + i] * mass[g + j];
        }
      }
    }
  }
}

template <class S>
struct SelfWeights {
  using T = Arith<S>;
  explicit SelfWeights(const SelfAttention& a, const void* out_bias_data)
      : query(a.qkv_weight, a.dim),
        key(static_cast<const S*>(a.qkv_weight) + a.dim),
        value_source(key + a.dim * a.dim),
        bias(a.qkv_bias, 1 + 2 * a.dim),
        key_bias(bias + 1),
        value_bias(key_bias + a.dim),
        out_bias(out_bias_data, a.dim) {}
  Weight<S> query;
  const S* key;           // [d, d] as stored
  const S* value_source;  // [d, d] as stored
  Weight<S> bias;
  const T *key_bias, *value_bias;
  Weight<S> out_bias;
};

// Padded length of a context row: whole vectors, so that a shuffle may load one.
template <class T>
int64_t context_stride(int64_t groups) { return round_up(groups, kLanes<T>); }

template <class S>
void compute_context(
    const SelfAttention& a, const SelfWeights<S>& w, const Arith<S>* pooled, const Arith<S>* mass, int64_t groups, Arith<S>* context) {
  using T = Arith<S>;
  const int64_t stride = context_stride<T>(groups);
  const int64_t threads = a.batch * groups * a.dim * a.dim < kSerialWork ? 1 : num_threads();
  const int64_t blocks = min_of(max_of<int64_t>(1, ceil_div(threads, max_of<int64_t>(a.batch, 1))), ceil_div(a.dim, 4));
  const auto body = [&](int64_t i) {
    const int64_t sample = i / blocks, quads = ceil_div(a.dim, 4);
    const Range part = share(quads, i % blocks, blocks);
    context_rows(
        w.key, w.key_bias, pooled + sample * groups * a.dim, mass + sample * groups, groups, a.dim, {part.begin * 4, min_of(part.end * 4, a.dim)},
        context + sample * a.dim * stride, stride);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < a.batch * blocks; ++i) body(i);
  } else {
    parallel(a.batch * blocks, body);
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
