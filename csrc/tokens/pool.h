// Mean and maximum over the rows of each sequence, and their gradients (vitkernels/ops/tokens/README.md).
#pragma once

#include "tokens/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kSumBlock = 64;  // rows that are summed apart before they join the sum of all: a long sum then rounds as a short one does

// body(s, channels) for every sequence and one more number, for the rows behind the last sequence; channels are shared out where sequences are few.
template <class T, class Body>
void for_sequences(const Pool& a, const Body& body) {
  const int64_t threads = workers(a.rows * a.dim), vectors = ceil_div(a.dim, kLanes<T>);
  const int64_t parts = threads == 1 ? 1 : min_of(vectors, ceil_div(4 * threads, a.sequences + 1));
  parallel_if(threads > 1, (a.sequences + 1) * parts, [&](int64_t i) { body(i / parts, channels<T>(a.dim, i % parts, parts)); });
}

// sums += a row. One row at a time, though the sums are loaded and stored each time: they are in the first cache, and memory likes to be
// read in its order.
template <class S>
void add_to_sums(const S* x, int64_t count, Arith<S>* sums) {
  for (int64_t c = 0; c < count; c += kLanes<Arith<S>>) store(sums + c, load(sums + c) + load_row(x + c, count - c));
}

template <class S>
void mean(const PoolForward& a, int64_t s, const Channels& part) {
  using T = Arith<S>;
  const int64_t rows = a.count(s), width = round_up(part.count, kLanes<T>);
  Buffer<T> buffer(2 * width);
  T *total = buffer.get(), *sums = total + width;
  std::memset(total, 0, static_cast<size_t>(width) * sizeof(T));
  const S* x = static_cast<const S*>(a.x) + a.begin(s) * a.x_stride + part.first;
  for (int64_t first = 0; first < rows; first += kSumBlock) {
    const int64_t end = min_of(first + kSumBlock, rows);
    std::memset(sums, 0, static_cast<size_t>(width) * sizeof(T));
    for (int64_t i = first; i < end; ++i) add_to_sums(x + i * a.x_stride, part.count, sums);
    for (int64_t c = 0; c < width; c += kLanes<T>) store(total + c, load(total + c) + load(sums + c));
  }
  S* out = static_cast<S*>(a.out) + s * a.dim + part.first;
  const T divisor = static_cast<T>(max_of<int64_t>(rows, 1));
  for (int64_t c = 0; c < part.count; c += kLanes<T>) store_row(out + c, load(total + c) / divisor, part.count - c);
}

template <class T>
inline IndexVec<T> load_index(const IndexVec<T>* p) {
  IndexVec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Keeps the larger of what is there and a row, whose number is `index`. The first of equals stays, and the first NaN.
template <class S>
void keep_larger(const S* x, int64_t count, int64_t index, Arith<S>* best, IndexVec<Arith<S>>* where) {
  using T = Arith<S>;
  const IndexVec<T> here = IndexVec<T>{} + static_cast<std::remove_reference_t<decltype((*where)[0])>>(index);
  for (int64_t c = 0; c < count; c += kLanes<T>, ++where) {
    const Vec<T> largest = load(best + c), value = load_row(x + c, count - c);
    const auto better = ~(value <= largest) & (largest == largest);
    store(best + c, better ? value : largest);
    const IndexVec<T> at = better ? here : load_index<T>(where);
    std::memcpy(where, &at, sizeof at);
  }
}

template <class S>
void maximum(const PoolForward& a, int64_t s, const Channels& part) {
  using T = Arith<S>;
  const int64_t rows = a.count(s), width = round_up(part.count, kLanes<T>);
  S* out = static_cast<S*>(a.out) + s * a.dim + part.first;
  int32_t* indices = a.indices + s * a.dim + part.first;
  if (rows == 0) {
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(part.count) * sizeof(S));
    for (int64_t c = 0; c < part.count; ++c) indices[c] = -1;
    return;
  }
  Buffer<T> best(width);
  Buffer<IndexVec<T>> where(width / kLanes<T>);
  const S* x = static_cast<const S*>(a.x) + a.begin(s) * a.x_stride + part.first;
  for (int64_t c = 0; c < part.count; c += kLanes<T>) store(best + c, load_row(x + c, part.count - c));
  std::memset(static_cast<void*>(where.get()), 0, static_cast<size_t>(width) * sizeof(T));
  for (int64_t i = 1; i < rows; ++i) keep_larger(x + i * a.x_stride, part.count, i, best.get(), where.get());
  for (int64_t c = 0; c < part.count; c += kLanes<T>) store_row(out + c, load(best + c), part.count - c);
  for (int64_t c = 0; c < part.count; ++c) indices[c] = static_cast<int32_t>(a.begin(s) + where[c / kLanes<T>][c % kLanes<T>]);
}

template <class S>
void pool_forward(const PoolForward& a) {
  for_sequences<Arith<S>>(a, [&](int64_t s, const Channels& part) {
    if (s < a.sequences) a.largest ? maximum<S>(a, s, part) : mean<S>(a, s, part);
  });
}

template <class S>
void pool_backward(const PoolBackward& a) {
  using T = Arith<S>;
  for_sequences<T>(a, [&](int64_t s, const Channels& part) {
    const int64_t begin = a.begin(s), count = s < a.sequences ? a.count(s) : 0, end = s < a.sequences ? a.cu[s + 1] : a.rows;
    const size_t bytes = static_cast<size_t>(part.count) * sizeof(S);
    S* grad_x = static_cast<S*>(a.grad_x) + part.first;
    const auto clear = [&](int64_t first) {
      for (int64_t i = first; i < end; ++i) std::memset(static_cast<void*>(grad_x + i * a.dim), 0, bytes);
    };
    const S* grad_out = static_cast<const S*>(a.grad_out) + s * a.dim + part.first;
    if (a.largest) {
      clear(begin);
      for (int64_t c = 0; count > 0 && c < part.count; ++c) grad_x[a.indices[s * a.dim + part.first + c] * a.dim + c] = grad_out[c];
      return;
    }
    clear(begin + count);
    if (count == 0) return;
    S* first = grad_x + begin * a.dim;
    for (int64_t c = 0; c < part.count; c += kLanes<T>) {
      store_row(first + c, load_row(grad_out + c, part.count - c) / static_cast<T>(count), part.count - c);
    }
    for (int64_t i = 1; i < count; ++i) std::memcpy(static_cast<void*>(first + i * a.dim), first, bytes);
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
