// What the forward and the backward of packed attention share: rows of heads in and out, their normalisation, packed keys, dropout, and how threads take units.
//
// Everything is token-major. Logits are rows of queries: S = Q K^T wants K^T as a panel [dim][keys], which a unit packs once; P V wants V as it is. Both
// products broadcast the left operand from any strides and read whole vectors of the right one (common/gemm.h).
#pragma once

#include <cmath>
#include <limits>

#include "common/gemm.h"
#include "common/philox.h"
#include "common/tile.h"
#include "packed/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace packed;

// --- rows of a head in memory, by storage type --------------------------------------------------------------------------------------

// Rows of one head: element (i, c) at data + i * row_stride + c * column_stride, of the storage type.
struct HeadRows {
  const void* data;
  int64_t row_stride, column_stride;

  // From a later row on, given as rows * bytes of an element.
  HeadRows after(int64_t row_bytes) const { return {static_cast<const char*>(data) + row_bytes * row_stride, row_stride, column_stride}; }
  // From a later column on, likewise.
  HeadRows from_column(int64_t column_bytes) const { return {static_cast<const char*>(data) + column_bytes * column_stride, row_stride, column_stride}; }
};

template <class S>
void load_rows(const HeadRows& from, int64_t rows, int64_t columns, Arith<S>* to, int64_t to_row) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const S* base = static_cast<const S*>(from.data);
  for (int64_t i = 0; i < rows; ++i) {
    const S* source = base + i * from.row_stride;
    T* target = to + i * to_row;
    if (from.column_stride == 1) {
      for (int64_t c = 0; c < to_row; c += lanes) {
        const int64_t left = columns - c;
        store(target + c, left >= lanes ? load(source + c) : left > 0 ? load_partial(source + c, left) : Vec<T>{});
      }
    } else {
      for (int64_t c = 0; c < to_row; ++c) target[c] = c < columns ? to_float(source[c * from.column_stride]) : T(0);
    }
  }
}

template <class S>
void store_rows(void* data, int64_t row_stride, int64_t rows, int64_t columns, const Arith<S>* from, int64_t from_row) {
  constexpr int64_t lanes = kLanes<Arith<S>>;
  for (int64_t i = 0; i < rows; ++i) {
    S* target = static_cast<S*>(data) + i * row_stride;
    const Arith<S>* source = from + i * from_row;
    for (int64_t c = 0; c < columns; c += lanes) {
      if (columns - c >= lanes) {
        store(target + c, load(source + c));
      } else {
        store_partial(target + c, load(source + c), columns - c);
      }
    }
  }
}

// How tensors are read and written, by the type they are stored in; all else is compiled for the arithmetic type alone.
template <class T>
struct Storage {
  int64_t bytes;  // of an element
  void (*load_rows)(const HeadRows& from, int64_t rows, int64_t columns, T* to, int64_t to_row);  // the padding of a row is zero
  void (*store_rows)(void* data, int64_t row_stride, int64_t rows, int64_t columns, const T* from, int64_t from_row);

  HeadRows head(const Rows& rows, int64_t row, int64_t head) const {
    return {static_cast<const char*>(rows.data) + (row * rows.row_stride + head * rows.head_stride) * bytes, rows.row_stride, rows.column_stride};
  }
  // Of a contiguous [rows, heads, columns] tensor.
  void* place(void* data, int64_t row, int64_t head, int64_t heads, int64_t columns) const {
    return static_cast<char*>(data) + (row * heads + head) * columns * bytes;
  }
};

template <class S>
constexpr Storage<Arith<S>> kStorage = {sizeof(S), load_rows<S>, store_rows<S>};

template <class T>
const Storage<T>& storage_of(Dtype dtype);
template <>
const Storage<double>& storage_of(Dtype) { return kStorage<double>; }
template <>
const Storage<float>& storage_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? kStorage<float> : dtype == Dtype::kBFloat16 ? kStorage<BFloat16> : kStorage<Float16>;
}

// --- sizes ----------------------------------------------------------------------------------------------------------------------------

// A sequence: its rows of q and of k.
struct Segment {
  int64_t q_begin, q_end, k_begin, keys;
};

inline Segment segment(const Attention& a, int64_t s) {
  const int64_t k_begin = a.cu_k[s];
  return {a.cu_q[s], a.cu_q[s + 1], k_begin, a.used_k ? a.used_k[s] : a.cu_k[s + 1] - k_begin};
}

// Keys of a chunk: up to as many the softmax sees a whole row at once. 128 to 256 are equally fast (a tile of logits is 16 to 32 kB).
constexpr int64_t kKeyChunk = 256;

// The rows of a tile: as even as blocks of eight rows allow.
inline int64_t even_tile(int64_t rows, int64_t most) {
  const int64_t tiles = max_of<int64_t>(ceil_div(rows, most), 1);
  return min_of(round_up(ceil_div(rows, tiles), kBlockRows), round_up(most, kBlockRows));
}

// run(unit, the one after it or null) for every unit, on whichever thread is free; the state that runs them is made once a thread.
template <class MakeState>
void for_units(const Schedule& schedule, const MakeState& make_state) {
  const int64_t batches = static_cast<int64_t>(schedule.batches.size()) - 1;
  int64_t next = 0;
  parallel(min_of(batches, num_threads()), [&](int64_t) {
    auto state = make_state();
    for (;;) {
      const int64_t b = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (b >= batches) return;
      const Unit* end = schedule.units.data() + schedule.batches.data()[b + 1];
      for (const Unit* unit = schedule.units.data() + schedule.batches.data()[b]; unit < end; ++unit) state.run(*unit, unit + 1 < end ? unit + 1 : nullptr);
    }
  });
}

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The first `left` lanes of v, `other` in the rest.
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int64_t left, T other) {
  constexpr IndexVec<T> lane = make_index<T>([](int i) { return i; });
  using Index = std::remove_cvref_t<decltype(lane[0])>;
  return lane < static_cast<Index>(left) ? v : broadcast(other);
}

// --- normalisation of a head's vectors --------------------------------------------------------------------------------------------------

// 1 / the length that a row is divided by, and the mean that is taken off first (layer only).
template <class T>
struct RowNorm {
  T mean, inverse;
  bool clamped;  // l2: the length is eps itself, and does not change with the row
};

template <class T>
inline T dot_rows(const T* a, const T* b, int64_t row) {
  Vec<T> sum{};
  for (int64_t c = 0; c < row; c += kLanes<T>) sum += load(a + c) * load(b + c);
  return reduce_add<T>(sum);
}

// One row [dim, padded with zeros to `row`].
template <class T>
inline RowNorm<T> row_norm(Norm kind, T eps, const T* x, int64_t dim, int64_t row) {
  if (kind == Norm::kLayer) {
    Vec<T> sum{};
    for (int64_t c = 0; c < row; c += kLanes<T>) sum += load(x + c);
    const T mean = reduce_add<T>(sum) / T(dim);
    Vec<T> squared{};
    for (int64_t c = 0; c < row; c += kLanes<T>) {
      const Vec<T> centred = first_lanes<T>(load(x + c) - mean, dim - c, T(0));
      squared += centred * centred;
    }
    const T squares = reduce_add<T>(squared);
    return {mean, T(1) / std::sqrt(squares / T(dim) + eps), false};
  }
  const T squares = dot_rows(x, x, row);
  if (kind == Norm::kRms) return {T(0), T(1) / std::sqrt(squares / T(dim) + eps), false};
  const T length = std::sqrt(squares);
  return {T(0), std::sqrt(T(dim)) / max_of(length, eps), !(length > eps)};
}

template <class T>
struct NormOf {
  Norm kind;
  T eps;
  const T *weight, *bias;  // [dim] of one head, or null
  int64_t dim, row;

  // None.
  NormOf() : kind(Norm::kNone), eps(0), weight(nullptr), bias(nullptr), dim(0), row(0) {}

  NormOf(const Attention& a, const HeadNorm& side, int64_t head)
      : kind(a.norm), eps(static_cast<T>(a.norm_eps)), weight(side.weight ? static_cast<const T*>(side.weight) + head * a.dim : nullptr),
        bias(side.bias ? static_cast<const T*>(side.bias) + head * a.dim : nullptr), dim(a.dim), row(round_up(a.dim, kLanes<T>)) {}

  // In place.
  void forward(T* x, int64_t rows) const {
    if (kind == Norm::kNone) return;
    for (int64_t i = 0; i < rows; ++i) {
      T* at = x + i * row;
      const RowNorm<T> n = row_norm(kind, eps, at, dim, row);
      for (int64_t c = 0; c < dim; ++c) at[c] = (at[c] - n.mean) * n.inverse;
      if (weight) {
        for (int64_t c = 0; c < dim; ++c) at[c] *= weight[c];
      }
      if (bias) {
        for (int64_t c = 0; c < dim; ++c) at[c] += bias[c];
      }
    }
  }

  // grad: of the normalised rows, becomes that of the raw rows x. The gradients of weight and bias are added to, where they are wanted.
  void backward(const T* x, T* grad, int64_t rows, T* grad_weight, T* grad_bias) const {
    if (kind == Norm::kNone) return;
    for (int64_t i = 0; i < rows; ++i) {
      const T* at = x + i * row;
      T* g = grad + i * row;
      const RowNorm<T> n = row_norm(kind, eps, at, dim, row);
      if (grad_bias) {
        for (int64_t c = 0; c < dim; ++c) grad_bias[c] += g[c];
      }
      if (grad_weight) {
        for (int64_t c = 0; c < dim; ++c) grad_weight[c] += g[c] * (at[c] - n.mean) * n.inverse;
      }
      if (weight) {
        for (int64_t c = 0; c < dim; ++c) g[c] *= weight[c];
      }
      Vec<T> sums{}, products{};  // over the row, whose padding is zero in g: of g, and of g times the centred row
      for (int64_t c = 0; c < row; c += kLanes<T>) sums += load(g + c), products += load(g + c) * (load(at + c) - n.mean);
      T along = reduce_add<T>(products);
      along *= n.inverse / T(dim);
      if (n.clamped) along = 0;
      const T mean = kind == Norm::kLayer ? reduce_add<T>(sums) / T(dim) : T(0);
      for (int64_t c = 0; c < dim; ++c) g[c] = (g[c] - mean - (at[c] - n.mean) * n.inverse * along) * n.inverse;
    }
  }
};

// --- dropout ------------------------------------------------------------------------------------------------------------------------------

// What each weight is multiplied by, [rows][row]: 0 or keep_factor, for global rows of q and of k. The counter is (key row, query row / 4, head, 0), the word
// that of query row % 4: four rows share one evaluation.
template <class T>
void dropout_factors(const Attention& a, int64_t head, int64_t first_query, int64_t rows, int64_t first_key, int64_t keys, T* out, int64_t row) {
  const T factor = static_cast<T>(a.keep_factor);
  for (int64_t group = first_query / 4; group * 4 < first_query + rows; ++group) {
    for (int64_t j = 0; j < keys; j += kPhiloxLanes) {
      PhiloxWords words;
      for (int c = 0; c < kPhiloxLanes; ++c) {
        words[0][c] = static_cast<uint32_t>(first_key + j) + static_cast<uint32_t>(c), words[1][c] = static_cast<uint32_t>(group);
        words[2][c] = static_cast<uint32_t>(head), words[3][c] = 0;
      }
      philox(a.seed, words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t i = group * 4 + w - first_query;
        if (i < 0 || i >= rows) continue;
        T* target = out + i * row + j;
        const int64_t count = min_of<int64_t>(row - j, kPhiloxLanes);
        for (int64_t c = 0; c < count; ++c) target[c] = words[w][c] > a.drop_limit ? factor : T(0);
      }
    }
  }
}

// --- logits ------------------------------------------------------------------------------------------------------------------------------

// The bias of one tile: [rows] of `keys` values, from query row i and key row j within the sequence.
template <class T>
inline const T* bias_row(const Attention& a, int64_t head, int64_t i, int64_t j) {
  return static_cast<const T*>(a.bias) + head * a.bias_head_stride + i * a.bias_row_stride + j;
}

template <class T>
inline void add_bias(const Attention& a, int64_t head, int64_t i, int64_t j, int64_t keys, T* logits) {
  const T* bias = bias_row<T>(a, head, i, j);
  int64_t c = 0;
  for (; c + kLanes<T> <= keys; c += kLanes<T>) store(logits + c, load(logits + c) + load(bias + c));
  for (; c < keys; ++c) logits[c] += bias[c];
}

// The right operands of the products lie in panels of two vectors, [depth][kPanel], one after the other: what a block of the product reads is then contiguous.
// (As one wide matrix, 256 columns are a stride of 1 kB, and the 64 rows of a head fall into an eighth of the sets of an L1 cache.)
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// gemm over such panels, `stride` elements apart.
template <class T, class Epilogue>
inline void gemm_panels(int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_row, int64_t a_col, const T* panels, int64_t stride, const Epilogue& epilogue) {
  for (int64_t v = 0; v < vectors; v += 2) {
    gemm<T>(rows, depth, min_of<int64_t>(vectors - v, 2), a, a_row, a_col, panels + v / 2 * stride, kPanel<T>, [&](int64_t i, int64_t c, Vec<T> acc) { epilogue(i, v + c, acc); });
  }
}

// Rows of a head as panels [columns][kPanel], zero beyond `count` up to a whole vector: K^T.
template <class T>
void pack_transposed(const Storage<T>& io, const HeadRows& from, int64_t count, int64_t columns, const NormOf<T>& norm, T* panels) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t stage_row = round_up(columns, lanes);
  Buffer<T> stage(lanes * stage_row);
  for (int64_t j = 0; j < round_up(count, lanes); j += lanes) {
    const int64_t rows = min_of(count - j, lanes);
    T* panel = panels + j / kPanel<T> * kPanel<T> * columns + j % kPanel<T>;
    io.load_rows(from.after(j * io.bytes), rows, columns, stage, stage_row);
    norm.forward(stage, rows);
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<T> block[lanes] = {};
      for (int64_t i = 0; i < rows; ++i) block[i] = load(stage + i * stage_row + c);
      transpose<T>(block);
      for (int64_t i = 0; i < min_of(columns - c, lanes); ++i) store(panel + (c + i) * kPanel<T>, block[i]);
    }
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
