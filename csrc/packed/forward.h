// The forward: for each unit, a tile of queries at a time against chunks of keys, with the softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
#pragma once

#include "packed/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kQueryTile = 32;

// The running softmax of a tile's rows: largest logit and sum of exponentials so far.
template <class T>
struct Running {
  T *largest, *sum;
};

// Logits [rows][row] to exp(logit - largest so far), in place; `keys` of a row count. scale_by[i] is what the row's earlier results are to be multiplied by.
template <class T>
inline void softmax_chunk(T* logits, int64_t row, int64_t rows, int64_t keys, bool masked, const Running<T>& running, T* scale_by) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t kUnroll = 4;
  const int64_t whole = keys / lanes * lanes, left = keys - whole;
  for (int64_t i = 0; i < rows; ++i) {
    T* at = logits + i * row;
    Vec<T> most[kUnroll];
    for (int64_t u = 0; u < kUnroll; ++u) most[u] = broadcast(-kInfinity<T>);
    int64_t c = 0;
    for (; c + kUnroll * lanes <= whole; c += kUnroll * lanes) {
#pragma GCC unroll 4
      for (int64_t u = 0; u < kUnroll; ++u) most[u] = max_vec(most[u], load(at + c + u * lanes));
    }
    for (; c < whole; c += lanes) most[0] = max_vec(most[0], load(at + c));
    if (left) most[1] = max_vec(most[1], first_lanes<T>(load(at + whole), left, -kInfinity<T>));
    const T before = running.largest[i];
    const T largest = max_of(before, reduce_max<T>(max_vec(max_vec(most[0], most[1]), max_vec(most[2], most[3]))));
    running.largest[i] = largest;
    if (largest == -kInfinity<T>) {  // nothing seen yet
      for (c = 0; c < row; c += lanes) store(at + c, Vec<T>{});
      scale_by[i] = 1;
      continue;
    }
    Vec<T> sums[2] = {};
    const auto weights = [&](auto exponential) {
      int64_t j = 0;
      for (; j + 2 * lanes <= whole; j += 2 * lanes) {
#pragma GCC unroll 2
        for (int64_t u = 0; u < 2; ++u) {
          const Vec<T> p = exponential(load(at + j + u * lanes) - largest);
          sums[u] += p;
          store(at + j + u * lanes, p);
        }
      }
      for (; j < whole; j += lanes) {
        const Vec<T> p = exponential(load(at + j) - largest);
        sums[0] += p;
        store(at + j, p);
      }
      if (left) {
        const Vec<T> p = first_lanes<T>(exponential(load(at + whole) - largest), left, T(0));
        sums[1] += p;
        store(at + whole, p);
      }
    };
    if (masked) {
      weights([](Vec<T> x) { return exp(x); });  // a hidden key weighs exactly nothing
    } else {
      weights([](Vec<T> x) { return exp_nonpositive(x); });
    }
    scale_by[i] = before == largest ? T(1) : std::exp(before - largest);
    running.sum[i] = running.sum[i] * scale_by[i] + reduce_add<T>(sums[0] + sums[1]);
  }
}

template <class T>
class ForwardUnit {
 public:
  explicit ForwardUnit(const Forward& a)
      : a_(a), io_(storage_of<T>(a.dtype)), dim_row_(round_up(a.dim, kLanes<T>)), value_row_(round_up(a.value_dim, kLanes<T>)), rows_(round_up(kQueryTile, kBlockRows)) {}

  void run(const Unit& unit) {
    if (unit.q_begin == unit.q_end) return;
    const Segment s = segment(a_, unit.sequence);
    Buffer<T> keys(round_up(s.keys, kKeyChunk) * a_.dim), values(s.keys * value_row_);
    const HeadRows k = io_.head(a_.k, s.k_begin, unit.kv_head), v = io_.head(a_.v, s.k_begin, unit.kv_head);
    pack_chunks(io_, k, s.keys, a_.dim, NormOf<T>(a_, a_.k_norm, unit.kv_head), keys.get());
    io_.load_rows(v, s.keys, a_.value_dim, values, value_row_);
    const int64_t group = a_.heads / a_.kv_heads, tile = even_tile(unit.q_end - unit.q_begin, kQueryTile);
    for (int64_t head = unit.kv_head * group; head < (unit.kv_head + 1) * group; ++head) {
      for (int64_t i = unit.q_begin; i < unit.q_end; i += tile) this->tile(s, head, i, min_of<int64_t>(tile, unit.q_end - i), keys, values);
    }
  }

 private:
  void tile(const Segment& s, int64_t head, int64_t first, int64_t rows, const T* keys, const T* values) {
    Buffer<T> q(rows_ * dim_row_), logits(rows_ * kKeyChunk), out(rows_ * value_row_), factors(a_.dropout ? rows_ * kKeyChunk : 0), small(3 * rows_);
    const Running<T> running = {small.get(), small + rows_};
    T* scale_by = small + 2 * rows_;
    for (int64_t i = 0; i < rows; ++i) running.largest[i] = -kInfinity<T>, running.sum[i] = 0;
    const int64_t row = s.q_begin + first;
    io_.load_rows(io_.head(a_.q, row, head), rows, a_.dim, q, dim_row_);
    NormOf<T>(a_, a_.q_norm, head).forward(q, rows);
    const T scale = static_cast<T>(a_.scale);
    for (int64_t j = 0; j < s.keys; j += kKeyChunk) {
      const int64_t count = min_of(kKeyChunk, s.keys - j), vectors = ceil_div(count, kLanes<T>), width = vectors * kLanes<T>;
      gemm<T>(rows, a_.dim, vectors, q.get(), dim_row_, 1, keys + j * a_.dim, width, [&](int64_t i, int64_t c, Vec<T> acc) {
        store(logits + i * kKeyChunk + c * kLanes<T>, acc * scale);
      });
      if (a_.bias) {
        for (int64_t i = 0; i < rows; ++i) add_bias<T>(a_, head, first + i, j, count, logits + i * kKeyChunk);
      }
      softmax_chunk<T>(logits, kKeyChunk, rows, count, a_.bias != nullptr, running, scale_by);
      if (a_.dropout) {
        dropout_factors<T>(a_, head, row, rows, s.k_begin + j, count, factors, kKeyChunk);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < count; ++c) logits[i * kKeyChunk + c] *= factors[i * kKeyChunk + c];
        }
      }
      if (j == 0) {
        gemm<T>(rows, count, value_row_ / kLanes<T>, logits.get(), kKeyChunk, 1, values, value_row_, [&](int64_t i, int64_t c, Vec<T> acc) {
          store(out + i * value_row_ + c * kLanes<T>, acc);
        });
      } else {
        gemm<T>(rows, count, value_row_ / kLanes<T>, logits.get(), kKeyChunk, 1, values + j * value_row_, value_row_, [&](int64_t i, int64_t c, Vec<T> acc) {
          T* at = out + i * value_row_ + c * kLanes<T>;
          store(at, load(at) * scale_by[i] + acc);
        });
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T sum = running.sum[i], factor = sum > 0 ? T(1) / sum : T(0);
      for (int64_t c = 0; c < value_row_; c += kLanes<T>) store(out + i * value_row_ + c, s.keys ? load(out + i * value_row_ + c) * factor : Vec<T>{});
      static_cast<T*>(a_.lse)[head * a_.total_q + row + i] = running.largest[i] + std::log(sum);
    }
    io_.store_rows(io_.place(a_.out, row, head, a_.heads, a_.value_dim), a_.heads * a_.value_dim, rows, a_.value_dim, out, value_row_);
  }

  const Forward& a_;
  const Storage<T>& io_;
  const int64_t dim_row_, value_row_, rows_;
};

// Rows beyond the last sequence.
template <class T>
void finish_padding(const Forward& a) {
  const Storage<T>& io = storage_of<T>(a.dtype);
  const int64_t first = a.cu_q[a.sequences], row = a.heads * a.value_dim;
  std::memset(io.place(a.out, first, 0, a.heads, a.value_dim), 0, static_cast<size_t>((a.total_q - first) * row * io.bytes));
  for (int64_t h = 0; h < a.heads; ++h) {
    for (int64_t i = first; i < a.total_q; ++i) static_cast<T*>(a.lse)[h * a.total_q + i] = -kInfinity<T>;
  }
}

template <class T>
void forward(const Forward& a) {
  finish_padding<T>(a);
  for_units(*a.schedule, [&] { return ForwardUnit<T>(a); });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
