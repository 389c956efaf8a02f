// The backward: recomputes the weights from the saved logsumexp (FlashAttention-2, arXiv 2307.08691, algorithm 2). A unit is a sequence and a head of keys, so that
// every gradient has one writer:
//
//   P = exp(S - lse);  dP = dO V^T;  dS = P (dP - delta), delta = rowsum(P dP) - dlse
//   dV += P^T dO;  dK += dS^T Q scale;  dQ = dS K scale
#pragma once

#include "packed/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Deeper than the forward's: a tile's rows are the depth of the products that add to dK and dV, which pass through memory once a tile. Fewer where the tile's
// maps, whole rows of P and dP, would leave the L2 cache.
constexpr int64_t kBackwardRows = 64, kLeastBackwardRows = 16, kMapBytes = 512 << 10;

// One head's keys and values in every form the products want, and their gradients so far.
template <class T>
struct KeySide {
  const T *keys, *keys_t, *values_t;  // [keys][dim_row]; panels of [dim] and of [value_dim]
  T *grad_k, *grad_v;                 // [keys][dim_row], [keys][value_row]
};

template <class T>
class BackwardUnit {
 public:
  explicit BackwardUnit(const Backward& a)
      : a_(a), io_(storage_of<T>(a.dtype)), dim_row_(round_up(a.dim, kLanes<T>)), value_row_(round_up(a.value_dim, kLanes<T>)),
        need_q_(a.grad_q || a.grad_q_weight || a.grad_q_bias), need_k_(a.grad_k || a.grad_k_weight || a.grad_k_bias) {}

  void run(const Unit& unit, const Unit*) {
    const Segment s = segment(a_, unit.sequence);
    const int64_t all_keys = a_.cu_k[unit.sequence + 1] - s.k_begin, chunked = round_up(s.keys, kKeyChunk);  // keys that are not in use have gradients: zero
    Buffer<T> raw(a_.norm == Norm::kNone ? 0 : s.keys * dim_row_), keys(s.keys * dim_row_), keys_t(chunked * a_.dim), values_t(chunked * a_.value_dim);
    Buffer<T> grad_k(all_keys * dim_row_), grad_v(all_keys * value_row_);
    clear(grad_k.get(), all_keys * dim_row_);
    clear(grad_v.get(), all_keys * value_row_);
    const NormOf<T> norm(a_, a_.k_norm, unit.kv_head);
    const HeadRows k = io_.head(a_.k, s.k_begin, unit.kv_head), v = io_.head(a_.v, s.k_begin, unit.kv_head);
    io_.load_rows(k, s.keys, a_.dim, keys, dim_row_);
    if (a_.norm != Norm::kNone) std::memcpy(raw.get(), keys.get(), static_cast<size_t>(s.keys * dim_row_) * sizeof(T));
    norm.forward(keys, s.keys);
    pack_transposed(io_, k, s.keys, a_.dim, [&](T* rows, int64_t n) { norm.forward(rows, n); }, keys_t.get());
    pack_transposed(io_, v, s.keys, a_.value_dim, [](T*, int64_t) {}, values_t.get());
    const KeySide<T> side = {keys, keys_t, values_t, grad_k, grad_v};
    const int64_t group = a_.heads / a_.kv_heads, queries = s.q_end - s.q_begin;
    const int64_t tile = even_tile(queries, most_rows(s.keys));
    for (int64_t head = unit.kv_head * group; head < (unit.kv_head + 1) * group; ++head) {
      T* weight = partial(a_.grad_q_weight, unit.sequence, head, a_.heads);
      T* bias = partial(a_.grad_q_bias, unit.sequence, head, a_.heads);
      for (int64_t i = 0; i < queries; i += tile) this->tile(s, head, i, min_of(tile, queries - i), side, weight, bias);
    }
    if (need_k_) {
      T* weight = partial(a_.grad_k_weight, unit.sequence, unit.kv_head, a_.kv_heads);
      T* bias = partial(a_.grad_k_bias, unit.sequence, unit.kv_head, a_.kv_heads);
      norm.backward(raw, grad_k, s.keys, weight, bias);
    }
    put(a_.grad_k, s.k_begin, all_keys, unit.kv_head, a_.kv_heads, a_.dim, grad_k, dim_row_);
    put(a_.grad_v, s.k_begin, all_keys, unit.kv_head, a_.kv_heads, a_.value_dim, grad_v, value_row_);
  }

 private:
  // Not a power of two, so that a column of a map does not fall into few sets of the cache.
  static int64_t map_row(int64_t keys) { return round_up(keys, kLanes<T>) + kLanes<T>; }
  static int64_t most_rows(int64_t keys) {
    return min_of(max_of(kMapBytes / (2 * map_row(keys) * static_cast<int64_t>(sizeof(T))), kLeastBackwardRows), kBackwardRows);
  }

  // A sequence's own part of a gradient of the norms, [sequences][heads][dim], zero at first; null if it is not wanted.
  T* partial(void* base, int64_t sequence, int64_t head, int64_t heads) const {
    return base ? static_cast<T*>(base) + (sequence * heads + head) * a_.dim : nullptr;
  }

  void put(void* grad, int64_t row, int64_t rows, int64_t head, int64_t heads, int64_t columns, const T* from, int64_t from_row) const {
    if (grad) io_.store_rows(io_.place(grad, row, head, heads, columns), heads * columns, rows, columns, from, from_row);
  }

  void tile(const Segment& s, int64_t head, int64_t first, int64_t rows, const KeySide<T>& side, T* grad_weight, T* grad_bias) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t row = s.q_begin + first, dim_vectors = dim_row_ / lanes, value_vectors = value_row_ / lanes;
    const int64_t width = map_row(s.keys);
    Buffer<T> raw(rows * dim_row_), q(rows * dim_row_), grad_out(rows * value_row_), grad_q(rows * dim_row_), delta(rows);
    Buffer<T> weights(rows * width), grads(rows * width), factors(a_.dropout ? rows * width : 0);
    io_.load_rows(io_.head(a_.q, row, head), rows, a_.dim, raw, dim_row_);
    std::memcpy(q.get(), raw.get(), static_cast<size_t>(rows * dim_row_) * sizeof(T));
    const NormOf<T> norm(a_, a_.q_norm, head);
    norm.forward(q, rows);
    if (a_.grad_out.data) {
      io_.load_rows(io_.head(a_.grad_out, row, head), rows, a_.value_dim, grad_out, value_row_);
    } else {
      clear(grad_out.get(), rows * value_row_);
    }
    clear(grad_q.get(), rows * dim_row_);
    const T scale = static_cast<T>(a_.scale);
    const int64_t vectors = ceil_div(s.keys, lanes);
    gemm_panels<T>(rows, a_.dim, vectors, q.get(), dim_row_, 1, side.keys_t, a_.dim * kPanel<T>, [&](int64_t i, int64_t c, Vec<T> acc) {
      store(weights + i * width + c * lanes, acc * scale);
    });
    gemm_panels<T>(rows, a_.value_dim, vectors, grad_out.get(), value_row_, 1, side.values_t, a_.value_dim * kPanel<T>, [&](int64_t i, int64_t c, Vec<T> acc) {
      store(grads + i * width + c * lanes, acc);
    });
    if (a_.dropout) dropout_factors<T>(a_, head, row, rows, s.k_begin, s.keys, factors, width);
    for (int64_t i = 0; i < rows; ++i) {
      if (a_.bias) add_bias<T>(a_, head, first + i, 0, s.keys, weights + i * width);
      const int64_t at = head * a_.total_q + row + i;
      const T grad_lse = a_.grad_lse ? static_cast<T>(static_cast<const double*>(a_.grad_lse)[at]) : T(0);
      logit_gradients(static_cast<const double*>(a_.lse)[at], grad_lse, s.keys, weights + i * width, grads + i * width, a_.dropout ? factors + i * width : nullptr);
    }
    if (a_.grad_bias) add_to_bias(head, first, rows, s.keys, grads, width);
    for (int64_t j = 0; j < s.keys; j += kKeyChunk) {
      const int64_t count = min_of(kKeyChunk, s.keys - j);
      if (a_.grad_v) {
        gemm<T>(count, rows, value_vectors, weights + j, 1, width, grad_out.get(), value_row_, [&](int64_t i, int64_t c, Vec<T> acc) {
          T* at = side.grad_v + (j + i) * value_row_ + c * lanes;
          store(at, load(at) + acc);
        });
      }
      if (need_k_) {
        gemm<T>(count, rows, dim_vectors, grads + j, 1, width, q.get(), dim_row_, [&](int64_t i, int64_t c, Vec<T> acc) {
          T* at = side.grad_k + (j + i) * dim_row_ + c * lanes;
          store(at, load(at) + acc * scale);
        });
      }
      if (need_q_) {
        gemm<T>(rows, count, dim_vectors, grads + j, width, 1, side.keys + j * dim_row_, dim_row_, [&](int64_t i, int64_t c, Vec<T> acc) {
          T* at = grad_q + i * dim_row_ + c * lanes;
          store(at, load(at) + acc * scale);
        });
      }
    }
    if (!need_q_) return;
    norm.backward(raw, grad_q, rows, grad_weight, grad_bias);
    put(a_.grad_q, row, rows, head, a_.heads, a_.dim, grad_q, dim_row_);
  }

  // Units of one head of keys are one unit here (see op.cpp), so that no two write to one bias.
  void add_to_bias(int64_t head, int64_t first, int64_t rows, int64_t keys, const T* grads, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) {
      T* target = static_cast<T*>(a_.grad_bias) + (head * a_.bias_rows + first + i) * a_.bias_columns;
      for (int64_t c = 0; c < keys; ++c) target[c] += grads[i * width + c];
    }
  }

  const Backward& a_;
  const Storage<T>& io_;
  const int64_t dim_row_, value_row_;
  const bool need_q_, need_k_;
};

// The rows of a contiguous gradient from `first` on, zero: padding beyond the last sequence.
template <class T>
void clear_padding(const Storage<T>& io, void* grad, int64_t first, int64_t rows, int64_t heads, int64_t columns) {
  if (grad) std::memset(io.place(grad, first, 0, heads, columns), 0, static_cast<size_t>((rows - first) * heads * columns * io.bytes));
}

// [sequences][size] to [size], sequence by sequence.
template <class T>
void sum_parts(const T* parts, int64_t sequences, int64_t size, void* out) {
  T* target = static_cast<T*>(out);
  clear(target, size);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t c = 0; c < size; ++c) target[c] += parts[s * size + c];
  }
}

template <class T>
void backward(const Backward& a) {
  const Storage<T>& io = storage_of<T>(a.dtype);
  clear_padding(io, a.grad_q, a.cu_q[a.sequences], a.total_q, a.heads, a.dim);
  clear_padding(io, a.grad_k, a.cu_k[a.sequences], a.total_k, a.kv_heads, a.dim);
  clear_padding(io, a.grad_v, a.cu_k[a.sequences], a.total_k, a.kv_heads, a.value_dim);
  struct Summed {
    void* Backward::*grad;
    int64_t heads;
  };
  const Summed all[] = {
      {&Backward::grad_q_weight, a.heads}, {&Backward::grad_q_bias, a.heads}, {&Backward::grad_k_weight, a.kv_heads}, {&Backward::grad_k_bias, a.kv_heads}};
  int64_t total = 0;
  for (const Summed& part : all) total += a.*part.grad ? a.sequences * part.heads * a.dim : 0;
  Buffer<T> parts(total);
  clear(parts.get(), total);
  Backward work = a;
  T* next = parts;
  for (const Summed& part : all) {
    if (!(a.*part.grad)) continue;
    work.*part.grad = next;
    next += a.sequences * part.heads * a.dim;
  }
  for_units(*a.schedule, [&] { return BackwardUnit<T>(work); });
  for (const Summed& part : all) {
    if (a.*part.grad) sum_parts(static_cast<const T*>(work.*part.grad), a.sequences, part.heads * a.dim, a.*part.grad);
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
