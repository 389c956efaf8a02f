// Factorized position embeddings: two rows of tables gathered and added to a token in one pass; backward without atomics
// (vitkernels/ops/tokens/README.md).
#pragma once

#include "tokens/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// The entries a token reads; the second counts for `share`, the first for the rest. An index reads its entry alone.
template <class T>
struct Entries {
  int64_t first, second;
  T share;
};

template <class T, bool kFractional>
inline Entries<T> entries(const Axis& axis, int64_t token) {
  if constexpr (!kFractional) {
    const int64_t index = static_cast<const int64_t*>(axis.positions)[token];
    return {index, index, T(0)};
  }
  const int64_t last = axis.length - 1;
  const T at = static_cast<const T*>(axis.positions)[token] * static_cast<T>(last);
  const int64_t first = at >= 1 ? min_of(static_cast<int64_t>(at), last) : 0;  // of NaN, too: the share is NaN then
  return {first, min_of(first + 1, last), at - static_cast<T>(first)};
}

template <class S, bool kFractional>
inline Vec<Arith<S>> embedding(const S* table, int64_t dim, const Entries<Arith<S>>& e, int64_t c) {
  const Vec<Arith<S>> first = load_row(table + e.first * dim + c, dim - c);
  if constexpr (!kFractional) return first;
  return first * (1 - e.share) + load_row(table + e.second * dim + c, dim - c) * e.share;
}

template <class S, bool kHeight, bool kWidth>
void position_rows(const PositionForward& a, Range tokens) {
  using T = Arith<S>;
  const S *height = static_cast<const S*>(a.height_table), *width = static_cast<const S*>(a.width_table);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const Entries<T> h = entries<T, kHeight>(a.height, t), w = entries<T, kWidth>(a.width, t);
    const S* x = static_cast<const S*>(a.x) + t * a.x_stride;
    S* out = static_cast<S*>(a.out) + t * a.dim;
    for (int64_t c = 0; c < a.dim; c += kLanes<T>) {
      const Vec<T> both = embedding<S, kHeight>(height, a.dim, h, c) + embedding<S, kWidth>(width, a.dim, w, c);
      store_row(out + c, load_row(x + c, a.dim - c) + both, a.dim - c);
    }
  }
}

template <class S>
void position_forward(const PositionForward& a) {
  const auto rows = a.height.fractional ? (a.width.fractional ? position_rows<S, true, true> : position_rows<S, true, false>)
                                        : (a.width.fractional ? position_rows<S, false, true> : position_rows<S, false, false>);
  const int64_t parts = min_of(workers(a.tokens * a.dim), a.tokens);
  parallel(parts, [&](int64_t part) { rows(a, share(a.tokens, part, parts)); });
}

// One worker's channels of the sums of one table, [length][row].
template <class T>
struct TableSums {
  T* data;
  int64_t row;

  void add(const Entries<T>& e, bool fractional, int64_t c, Vec<T> grad) const {
    T* first = data + e.first * row + c;
    if (!fractional) return store(first, load(first) + grad);
    store(first, load(first) + grad * (1 - e.share));
    T* second = data + e.second * row + c;
    store(second, load(second) + grad * e.share);
  }
  template <class S>
  void finish(S* table, int64_t length, int64_t dim, const Channels& part) const {
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t c = 0; c < part.count; c += kLanes<T>) store_row(table + i * dim + part.first + c, load(data + i * row + c), part.count - c);
    }
  }
};

// Each worker takes some channels of all tokens, so every sum has one owner and is added up in the order of the tokens, however many
// workers there are.
template <class S, bool kHeight, bool kWidth>
void position_sums(const PositionBackward& a, const Channels& part) {
  using T = Arith<S>;
  const int64_t row = round_up(part.count, kLanes<T>);
  const int64_t heights = a.grad_height ? a.height.length : 0, widths = a.grad_width ? a.width.length : 0;
  Buffer<T> sums((heights + widths) * row);
  std::memset(sums.get(), 0, static_cast<size_t>((heights + widths) * row) * sizeof(T));
  const TableSums<T> height{sums.get(), row}, width{sums.get() + heights * row, row};
  for (int64_t t = 0; t < a.tokens; ++t) {
    const Entries<T> h = entries<T, kHeight>(a.height, t), w = entries<T, kWidth>(a.width, t);
    const S* grad = static_cast<const S*>(a.grad_out) + t * a.grad_stride + part.first;
    for (int64_t c = 0; c < part.count; c += kLanes<T>) {
      const Vec<T> g = load_row(grad + c, part.count - c);
      if (heights) height.add(h, kHeight, c, g);
      if (widths) width.add(w, kWidth, c, g);
    }
  }
  height.finish(static_cast<S*>(a.grad_height), heights, a.dim, part);
  width.finish(static_cast<S*>(a.grad_width), widths, a.dim, part);
}

template <class S>
void position_backward(const PositionBackward& a) {
  using T = Arith<S>;
  const auto sums = a.height.fractional ? (a.width.fractional ? position_sums<S, true, true> : position_sums<S, true, false>)
                                        : (a.width.fractional ? position_sums<S, false, true> : position_sums<S, false, false>);
  const int64_t parts = min_of(workers(a.tokens * a.dim), ceil_div(a.dim, kLanes<T>));
  parallel(parts, [&](int64_t part) { sums(a, channels<T>(a.dim, part, parts)); });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
