// What the forward and the backward of packed attention share: rows of heads in and out, their normalisation, packed keys, and how threads take units.
//
// Everything is token-major. Logits are rows of queries: S = Q K^T wants K^T as a panel [dim][keys], which a unit packs once; P V wants V as it is. Both
// products broadcast the left operand from any strides and read whole vectors of the right one (common/gemm.h).
#pragma once

#include <cmath>

#include "common/maps.h"
#include "packed/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace packed;

// --- sizes ----------------------------------------------------------------------------------------------------------------------------

// A sequence: its rows among those of q and of k, its own keys in use, and how many there are with the shared ones.
struct Segment {
  int64_t index, q_begin, q_end, k_begin, own, keys;
};

inline Segment segment(const Attention& a, int64_t s) {
  const int64_t k_begin = a.cu_k[s], own = a.used_k ? a.used_k[s] : a.cu_k[s + 1] - k_begin;
  return {s, a.cu_q[s], a.cu_q[s + 1], k_begin, own, own + a.shared};
}

// One head's rows of a sequence that begins at row `begin` of all.
template <class T>
HeadRows rows_of(const Attention& a, const Storage<T>& io, const Rows& rows, const Segment& s, int64_t begin, int64_t head) {
  const Places& at = a.places;
  const int64_t start = at.packed ? begin * rows.row_stride
                                  : s.index / (at.height * at.width) * rows.image_stride + s.index / at.width % at.height * rows.height_stride +
                                        s.index % at.width * rows.width_stride;
  const char* data = static_cast<const char*>(rows.data) + (start + head * rows.head_stride) * io.bytes;
  return {data, rows.row_stride * io.bytes, rows.column_stride, at.line, rows.line_stride * io.bytes};
}

template <class T>
HeadRows query_rows(const Attention& a, const Storage<T>& io, const Rows& rows, const Segment& s, int64_t head, int64_t first) {
  return rows_of(a, io, rows, s, s.q_begin, head).after(first);
}

// Of k or v, and the shared ones [shared, kv_heads, columns] behind them.
template <class T>
HeadRows key_rows(const Attention& a, const Storage<T>& io, const Rows& rows, const Segment& s, int64_t head, const void* shared, int64_t columns) {
  HeadRows found = rows_of(a, io, rows, s, s.k_begin, head);
  if (a.shared) {
    found.tail = static_cast<const char*>(shared) + head * columns * io.bytes;
    found.own = s.own, found.tail_bytes = a.kv_heads * columns * io.bytes;
  }
  return found;
}

// Of query `first` of a sequence, in the logsumexp and its gradient.
inline int64_t lse_at(const Attention& a, const Segment& s, int64_t head, int64_t first) {
  return a.places.packed ? head * a.total_q + s.q_begin + first : s.q_begin * a.heads + head * (s.q_end - s.q_begin) + first;
}

// Zeros in the rows of a packed contiguous tensor from `first` on: padding beyond the last sequence.
inline void clear_rows(const Attention& a, const Rows& rows, int64_t first, int64_t total, int64_t heads, int64_t columns) {
  const int64_t bytes = a.dtype == Dtype::kFloat64 ? 8 : a.dtype == Dtype::kFloat32 ? 4 : 2;
  if (rows.data && first < total) std::memset(static_cast<char*>(rows.data) + first * heads * columns * bytes, 0, static_cast<size_t>((total - first) * heads * columns * bytes));
}

// The sequence's first key in the numbering of dropout.
inline int64_t first_key(const Attention& a, const Segment& s) { return s.k_begin + s.index * a.shared; }

// Keys of a chunk: up to as many the softmax sees a whole row at once. 128 to 256 are equally fast (a tile of logits is 16 to 32 kB).
constexpr int64_t kKeyChunk = 256;

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

// --- normalisation of a head's vectors --------------------------------------------------------------------------------------------------

// 1 / the length that a row is divided by, and the mean that is taken off first (layer only).
template <class T>
struct RowNorm {
  T mean, inverse;
  bool clamped;  // l2: the length is eps itself, and does not change with the row
};

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

// Whether bfloat16 is multiplied in pairs here.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <class T>
struct NormOf {
  Norm kind;
  T eps;
  const T *weight, *bias;  // [dim] of one head, or null
  int64_t dim, row;
  bool rounded;  // to bfloat16, as the forward's products take them: the backward's logits have to be the forward's

  NormOf(const Attention& a, const HeadNorm& side, int64_t head)
      : kind(a.norm), eps(static_cast<T>(a.norm_eps)), weight(side.weight ? static_cast<const T*>(side.weight) + head * a.dim : nullptr),
        bias(side.bias ? static_cast<const T*>(side.bias) + head * a.dim : nullptr), dim(a.dim), row(round_up(a.dim, kLanes<T>)),
        rounded(kPairs && a.dtype == Dtype::kBFloat16) {}

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
      if (rounded) round_row(at);
    }
  }

  void round_row(T* at) const {
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t c = 0; c < row; c += kFloatLanes) store(at + c, reinterpret_cast<Vec<float>>(round_to_bfloat16(load(at + c)) & 0xffff0000u));
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

// --- logits ------------------------------------------------------------------------------------------------------------------------------

// Adds the bias of query i and the keys from j on, counted within the sequence.
template <class T>
inline void add_bias(const Attention& a, int64_t sequence, int64_t head, int64_t i, int64_t j, int64_t keys, T* logits) {
  const T* bias = static_cast<const T*>(a.bias) + sequence * a.bias_sequence_stride + head * a.bias_head_stride + i * a.bias_row_stride;
  if (a.bias_column_stride == 0) {
    for (int64_t c = 0; c < keys; ++c) logits[c] += *bias;
    return;
  }
  bias += j;
  int64_t c = 0;
  for (; c + kLanes<T> <= keys; c += kLanes<T>) store(logits + c, load(logits + c) + load(bias + c));
  for (; c < keys; ++c) logits[c] += bias[c];
}

// Keys of a sequence that are padding, -inf among zeros; nothing where none of those in use is.
template <class T>
class Padding {
 public:
  Padding(const Attention& a, const Segment& s) : hidden_(found(a, s) ? round_up(s.keys, kLanes<T>) : 0), any_(found(a, s)) {
    if (!any_) return;
    const uint8_t* shown = row(a, s);
    for (int64_t j = 0; j < round_up(s.keys, kLanes<T>); ++j) hidden_.get()[j] = j >= s.own || shown[j] ? T(0) : -std::numeric_limits<T>::infinity();
  }
  explicit operator bool() const { return any_; }
  // Takes them off the logits of the keys from j on, whatever these are.
  void hide(int64_t j, int64_t keys, T* logits) const {
    for (int64_t c = 0; c < keys; c += kLanes<T>) {
      const Vec<T> hidden = load(hidden_.get() + j + c);
      store(logits + c, hidden < T(0) ? hidden : load(logits + c));
    }
  }

 private:
  static const uint8_t* row(const Attention& a, const Segment& s) { return a.key_padding + s.k_begin; }
  static bool found(const Attention& a, const Segment& s) { return a.key_padding && std::memchr(row(a, s), 0, static_cast<size_t>(s.own)); }

  Buffer<T> hidden_;
  const bool any_;
};

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
