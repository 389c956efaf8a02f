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
        need_q_(a.grad_q.data || a.grad_q_weight || a.grad_q_bias), need_k_(a.grad_k.data || a.grad_shared_k || a.grad_k_weight || a.grad_k_bias),
        need_v_(a.grad_v.data || a.grad_shared_v) {}

  void run(const Unit& unit, const Unit*) {
    const Segment s = segment(a_, unit.sequence);
    const int64_t own_keys = a_.cu_k[unit.sequence + 1] - s.k_begin, all_keys = own_keys + a_.shared;  // keys that are not in use have gradients: zero
    const int64_t chunked = round_up(s.keys, kKeyChunk);
    Buffer<T> raw(a_.norm == Norm::kNone ? 0 : s.keys * dim_row_), keys(s.keys * dim_row_), keys_t(chunked * a_.dim), values_t(chunked * a_.value_dim);
    Buffer<T> grad_k(all_keys * dim_row_), grad_v(all_keys * value_row_);
    clear(grad_k.get(), all_keys * dim_row_);
    clear(grad_v.get(), all_keys * value_row_);
    const NormOf<T> norm(a_, a_.k_norm, unit.kv_head);
    const HeadRows k = key_rows(a_, io_, a_.k, s, unit.kv_head, a_.shared_k, a_.dim), v = key_rows(a_, io_, a_.v, s, unit.kv_head, a_.shared_v, a_.value_dim);
    const Padding<T> padding(a_, s);
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
      for (int64_t i = 0; i < queries; i += tile) this->tile(s, head, i, min_of(tile, queries - i), side, padding, weight, bias);
    }
    if (need_k_) {
      T* weight = partial(a_.grad_k_weight, unit.sequence, unit.kv_head, a_.kv_heads);
      T* bias = partial(a_.grad_k_bias, unit.sequence, unit.kv_head, a_.kv_heads);
      norm.backward(raw, grad_k, s.keys, weight, bias);
    }
    if (a_.grad_k.data) io_.store_rows(rows_of(a_, io_, a_.grad_k, s, s.k_begin, unit.kv_head), own_keys, a_.dim, grad_k, dim_row_);
    if (a_.grad_v.data) io_.store_rows(rows_of(a_, io_, a_.grad_v, s, s.k_begin, unit.kv_head), own_keys, a_.value_dim, grad_v, value_row_);
    keep_shared(a_.grad_shared_k, s.index, unit.kv_head, a_.dim, grad_k + own_keys * dim_row_, dim_row_);
    keep_shared(a_.grad_shared_v, s.index, unit.kv_head, a_.value_dim, grad_v + own_keys * value_row_, value_row_);
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

  // A sequence's own part of the gradient of the shared keys, [sequences][shared][kv_heads][columns].
  void keep_shared(void* parts, int64_t sequence, int64_t head, int64_t columns, const T* from, int64_t from_row) const {
    for (int64_t j = 0; parts && j < a_.shared; ++j) {
      std::memcpy(static_cast<T*>(parts) + ((sequence * a_.shared + j) * a_.kv_heads + head) * columns, from + j * from_row, static_cast<size_t>(columns) * sizeof(T));
    }
  }

  void tile(const Segment& s, int64_t head, int64_t first, int64_t rows, const KeySide<T>& side, const Padding<T>& padding, T* grad_weight, T* grad_bias) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t dim_vectors = dim_row_ / lanes, value_vectors = value_row_ / lanes;
    const int64_t width = map_row(s.keys);
    const bool normed = a_.norm != Norm::kNone;
    Buffer<T> raw(normed ? rows * dim_row_ : 0), q(rows * dim_row_), grad_out(rows * value_row_), grad_q(rows * dim_row_);
    Buffer<T> weights(rows * width), grads(rows * width), factors(a_.dropout ? rows * width : 0);
    io_.load_rows(query_rows(a_, io_, a_.q, s, head, first), rows, a_.dim, q, dim_row_);
    if (normed) std::memcpy(raw.get(), q.get(), static_cast<size_t>(rows * dim_row_) * sizeof(T));
    const NormOf<T> norm(a_, a_.q_norm, head);
    norm.forward(q, rows);
    if (a_.grad_out.data) {
      io_.load_rows(query_rows(a_, io_, a_.grad_out, s, head, first), rows, a_.value_dim, grad_out, value_row_);
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
    if (a_.dropout) dropout_factors<T>(a_, head, s.q_begin + first, rows, first_key(a_, s), s.keys, factors, width);
    for (int64_t i = 0; i < rows; ++i) {
      if (a_.bias) add_bias<T>(a_, s.index, head, first + i, 0, s.keys, weights + i * width);
      if (padding) padding.hide(0, s.keys, weights + i * width);
      const int64_t at = lse_at(a_, s, head, first + i);
      const T grad_lse = a_.grad_lse ? static_cast<T>(static_cast<const double*>(a_.grad_lse)[at]) : T(0);
      logit_gradients(static_cast<const double*>(a_.lse)[at], grad_lse, s.keys, weights + i * width, grads + i * width, a_.dropout ? factors + i * width : nullptr);
    }
    if (a_.grad_bias) add_to_bias(s, head, first, rows, grads, width);
    for (int64_t j = 0; j < s.keys; j += kKeyChunk) {
      const int64_t count = min_of(kKeyChunk, s.keys - j);
      if (need_v_) {
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
    if (a_.grad_q.data) io_.store_rows(query_rows(a_, io_, a_.grad_q, s, head, first), rows, a_.dim, grad_q, dim_row_);
  }

  // Units that write to one place are one batch here (see by_part), so that they do it one after the other.
  void add_to_bias(const Segment& s, int64_t head, int64_t first, int64_t rows, const T* grads, int64_t width) const {
    T* base = static_cast<T*>(a_.grad_bias) + s.index / a_.grad_bias_sequences * a_.grad_bias_sequence_stride + head * a_.grad_bias_head_stride;
    for (int64_t i = 0; i < rows; ++i) {
      T* target = base + (first + i) * a_.grad_bias_row_stride;
      const T* from = grads + i * width;
      if (a_.grad_bias_column_stride == 0) {
        Vec<T> sum{};
        for (int64_t c = 0; c < s.keys; c += kLanes<T>) sum += first_lanes<T>(load(from + c), s.keys - c, T(0));
        *target += reduce_add<T>(sum);
        continue;
      }
      for (int64_t c = 0; c < s.keys; ++c) target[c] += from[c];
    }
  }

  const Backward& a_;
  const Storage<T>& io_;
  const int64_t dim_row_, value_row_;
  const bool need_q_, need_k_, need_v_;
};

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
  clear_rows(a, a.grad_q, a.cu_q[a.sequences], a.total_q, a.heads, a.dim);
  clear_rows(a, a.grad_k, a.cu_k[a.sequences], a.total_k, a.kv_heads, a.dim);
  clear_rows(a, a.grad_v, a.cu_k[a.sequences], a.total_k, a.kv_heads, a.value_dim);
  struct Summed {
    void* Backward::*grad;
    int64_t size;
  };
  const Summed all[] = {{&Backward::grad_q_weight, a.heads * a.dim},
                        {&Backward::grad_q_bias, a.heads * a.dim},
                        {&Backward::grad_k_weight, a.kv_heads * a.dim},
                        {&Backward::grad_k_bias, a.kv_heads * a.dim},
                        {&Backward::grad_shared_k, a.shared * a.kv_heads * a.dim},
                        {&Backward::grad_shared_v, a.shared * a.kv_heads * a.value_dim}};
  int64_t total = 0;
  for (const Summed& part : all) total += a.*part.grad ? a.sequences * part.size : 0;
  Buffer<T> parts(total);
  clear(parts.get(), total);
  Backward work = a;
  T* next = parts;
  for (const Summed& part : all) {
    if (!(a.*part.grad)) continue;
    work.*part.grad = next;
    next += a.sequences * part.size;
  }
  for_units(*a.schedule, [&] { return BackwardUnit<T>(work); });
  for (const Summed& part : all) {
    if (!(a.*part.grad)) continue;
    Buffer<T> sum(part.size + kLanes<T>);
    sum_parts(static_cast<const T*>(work.*part.grad), a.sequences, part.size, sum.get());
    if (part.grad == &Backward::grad_shared_k || part.grad == &Backward::grad_shared_v) {
      io.store_rows({a.*part.grad, 0, 1}, 1, part.size, sum, 0);
    } else {
      std::memcpy(a.*part.grad, sum.get(), static_cast<size_t>(part.size) * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
