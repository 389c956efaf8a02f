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

// The maximum of NaN and -inf may be -inf.
template <class T>
inline bool has_nan(const T* row, int64_t count) {
  bool found = false;
  for (int64_t c = 0; c < count; ++c) found |= row[c] != row[c];
  return found;
}

// Logits [rows][row] to put(i, c, exp(logit - largest so far)), vector by vector; `keys` of a row count, what fills up its last vector is zero. scale_by[i] is what
// the row's earlier results are to be multiplied by.
template <class T, class Put, class Between>
inline void softmax_chunk(
    const T* logits, int64_t row, int64_t rows, int64_t keys, bool masked, const Running<T>& running, T* scale_by, const Put& put, const Between& between) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t kUnroll = 4;
  const int64_t whole = keys / lanes * lanes, left = keys - whole;
  for (int64_t i = 0; i < rows; ++i) {
    const T* at = logits + i * row;
    Vec<T> most[kUnroll];
    for (int64_t u = 0; u < kUnroll; ++u) most[u] = broadcast(-kInfinity<T>);
    int64_t c = 0;
    for (; c + kUnroll * lanes <= whole; c += kUnroll * lanes) {
#pragma GCC unroll 4
      for (int64_t u = 0; u < kUnroll; ++u) most[u] = max_vec(most[u], load(at + c + u * lanes));
    }
    for (; c < whole; c += lanes) most[0] = max_vec(most[0], load(at + c));
    if (left) most[1] = max_vec(most[1], first_lanes<T>(load(at + whole), left, -kInfinity<T>));
    const T before = running.largest[i], here = reduce_max<T>(max_vec(max_vec(most[0], most[1]), max_vec(most[2], most[3])));
    const T largest = here <= before ? before : here;  // here, if it is NaN
    running.largest[i] = largest;
    if (largest == -kInfinity<T> && !has_nan(at, keys)) {  // nothing seen yet
      for (c = 0; c < keys; c += lanes) put(i, c, Vec<T>{});
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
          put(i, j + u * lanes, p);
        }
      }
      for (; j < whole; j += lanes) {
        const Vec<T> p = exponential(load(at + j) - largest);
        sums[0] += p;
        put(i, j, p);
      }
      if (left) {
        const Vec<T> p = first_lanes<T>(exponential(load(at + whole) - largest), left, T(0));
        sums[1] += p;
        put(i, whole, p);
      }
    };
    if (masked) {
      weights([](Vec<T> x) { return exp(x); });  // a hidden key weighs exactly nothing
    } else {
      weights([](Vec<T> x) { return exp_nonpositive(x); });
    }
    scale_by[i] = before == largest ? T(1) : before == -kInfinity<T> ? T(0) : std::exp(before - largest);
    running.sum[i] = running.sum[i] * scale_by[i] + reduce_add<T>(sums[0] + sums[1]);
    between();
  }
}

// The products of a tile in the arithmetic type: P in place of the logits.
template <class T>
class Products {
 public:
  explicit Products(const Forward& a) : a_(a), io_(storage_of<T>(a.dtype)), dim_row_(round_up(a.dim, kLanes<T>)), value_row_(round_up(a.value_dim, kLanes<T>)) {}

  // Elements of T that the packed keys, the values and a tile's queries take.
  int64_t keys_size(int64_t keys) const { return round_up(keys, kKeyChunk) * a_.dim; }
  int64_t values_size(int64_t keys) const { return keys * round_up(value_row_, kPanel<T>); }
  int64_t queries_size(int64_t rows) const { return rows * dim_row_; }
  int64_t weights_size(int64_t) const { return 0; }

  void pack(const HeadRows& k, const HeadRows& v, int64_t count, const NormOf<T>& norm, T* keys, T* values) const {
    pack_transposed(io_, k, count, a_.dim, [&](T* rows, int64_t n) { norm.forward(rows, n); }, keys);
    for (int64_t c = 0; c < a_.value_dim; c += kPanel<T>) {
      io_.load_rows(v.from_column(c * io_.bytes), count, min_of(a_.value_dim - c, kPanel<T>), values + c * count, kPanel<T>);
    }
  }
  void load_queries(const HeadRows& q, int64_t rows, const NormOf<T>& norm, T* queries) const {
    io_.load_rows(q, rows, a_.dim, queries, dim_row_);
    norm.forward(queries, rows);
  }
  // Q K^T of the chunk that begins at key j, `count` keys.
  template <class Epilogue>
  void logits(int64_t rows, int64_t j, int64_t count, const T* queries, const T* keys, const Epilogue& epilogue) const {
    gemm_panels<T>(rows, a_.dim, ceil_div(count, kLanes<T>), queries, dim_row_, 1, keys + j * a_.dim, a_.dim * kPanel<T>, epilogue);
  }
  void put_weights(T* logits, T*, int64_t i, int64_t c, Vec<T> p) const { store(logits + i * kKeyChunk + c, p); }
  // P V of that chunk, of `keys` in all.
  template <class Epilogue>
  void out(int64_t rows, int64_t j, int64_t count, int64_t keys, const T* logits, const T*, const T* values, const Epilogue& epilogue) const {
    gemm_panels<T>(rows, count, value_row_ / kLanes<T>, logits, kKeyChunk, 1, values + j * kPanel<T>, keys * kPanel<T>, epilogue);
  }

 private:
  const Forward& a_;
  const Storage<T>& io_;
  const int64_t dim_row_, value_row_;
};

#if defined(__AVX512BF16__)

// The same with bfloat16 operands, two a lane, and float accumulators. P is rounded to bfloat16, as PyTorch's attention does.
class PairProducts {
 public:
  explicit PairProducts(const Forward& a)
      : a_(a), io_(storage_of<float>(a.dtype)), value_row_(round_up(a.value_dim, kFloatLanes)), pairs_(ceil_div(a.dim, 2)), pairs_row_(round_up(pairs_, kFloatLanes)) {}

  int64_t keys_size(int64_t keys) const { return round_up(keys, kKeyChunk) * pairs_; }
  int64_t values_size(int64_t keys) const { return ceil_div(keys, 2) * round_up(value_row_, kPanel<float>); }
  int64_t queries_size(int64_t rows) const { return rows * pairs_row_; }
  int64_t weights_size(int64_t rows) const { return rows * kKeyChunk / 2; }

  void pack(const HeadRows& k, const HeadRows& v, int64_t count, const NormOf<float>& norm, float* keys, float* values) const {
    pack_transposed_pairs(io_, k, count, a_.dim, norm.kind == Norm::kNone, [&](float* rows, int64_t n) { norm.forward(rows, n); }, keys);
    pack_row_pairs(v, count, a_.value_dim, values);
  }
  void load_queries(const HeadRows& from, int64_t rows, const NormOf<float>& norm, float* queries) const {
    load_pairs(io_, from, rows, a_.dim, norm.kind == Norm::kNone, [&](float* wide, int64_t n) { norm.forward(wide, n); }, queries, pairs_row_);
  }
  template <class Epilogue>
  void logits(int64_t rows, int64_t j, int64_t count, const float* queries, const float* keys, const Epilogue& epilogue) const {
    gemm_pairs(rows, pairs_, ceil_div(count, kFloatLanes), queries, 2 * pairs_row_, keys + j * pairs_, pairs_ * kPanel<float>, epilogue);
  }
  void put_weights(float*, float* weights, int64_t i, int64_t c, Vec<float> p) const { store_bfloat16(weights + i * kKeyChunk / 2, c, p); }
  template <class Epilogue>
  void out(int64_t rows, int64_t j, int64_t count, int64_t keys, const float*, const float* weights, const float* values, const Epilogue& epilogue) const {
    const int64_t stride = ceil_div(keys, 2) * kPanel<float>;
    gemm_pairs(rows, ceil_div(count, 2), value_row_ / kFloatLanes, weights, kKeyChunk, values + j / 2 * kPanel<float>, stride, epilogue);
  }

 private:
  const Forward& a_;
  const Storage<float>& io_;
  const int64_t value_row_, pairs_, pairs_row_;
};

#endif  // __AVX512BF16__

// Fetches the rows of a coming unit while this one computes, a row at a time: rows of one head are far apart, and no hardware prefetcher sees them coming.
template <class T>
class Prefetch {
 public:
  Prefetch(const Attention& a, const Storage<T>& io, const Unit* unit) {
    if (!unit) return;
    const Segment s = segment(a, unit->sequence);
    const auto side = [&](const HeadRows& rows, int64_t count, int64_t columns) -> Side { return {rows, 0, rows.column_stride == 1 ? count : 0, columns * io.bytes}; };
    sides_[0] = side(query_rows(a, io, a.q, s, unit->kv_head * (a.heads / a.kv_heads), unit->q_begin), unit->q_end - unit->q_begin, a.dim);
    sides_[1] = side(rows_of(a, io, a.k, s, s.k_begin, unit->kv_head), s.own, a.dim);
    sides_[2] = side(rows_of(a, io, a.v, s, s.k_begin, unit->kv_head), s.own, a.value_dim);
  }
  void row() {
    for (Side& side : sides_) {
      if (side.next == side.count) continue;
      const char* at = side.rows.template row<char>(side.next++);
      for (int64_t b = 0; b < side.size; b += 64) __builtin_prefetch(at + b, 0, 2);
    }
  }

 private:
  struct Side {
    HeadRows rows;
    int64_t next, count, size;
  };
  Side sides_[3] = {};
};

template <class T, class P>
class ForwardUnit {
 public:
  explicit ForwardUnit(const Forward& a) : a_(a), io_(storage_of<T>(a.dtype)), products_(a), value_row_(round_up(a.value_dim, kLanes<T>)), rows_(round_up(kQueryTile, kBlockRows)) {}

  void run(const Unit& unit, const Unit* next) {
    if (unit.q_begin == unit.q_end) return;
    const Segment s = segment(a_, unit.sequence);
    Buffer<T> keys(products_.keys_size(s.keys)), values(products_.values_size(s.keys));
    products_.pack(key_rows(a_, io_, a_.k, s, unit.kv_head, a_.shared_k, a_.dim), key_rows(a_, io_, a_.v, s, unit.kv_head, a_.shared_v, a_.value_dim), s.keys,
                   NormOf<T>(a_, a_.k_norm, unit.kv_head), keys.get(), values.get());
    const Padding<T> padding(a_, s);
    Prefetch<T> prefetch(a_, io_, next);
    const int64_t group = a_.heads / a_.kv_heads, tile = even_tile(unit.q_end - unit.q_begin, kQueryTile);
    for (int64_t head = unit.kv_head * group; head < (unit.kv_head + 1) * group; ++head) {
      for (int64_t i = unit.q_begin; i < unit.q_end; i += tile) this->tile(s, head, i, min_of<int64_t>(tile, unit.q_end - i), keys, values, padding, prefetch);
    }
  }

 private:
  void tile(const Segment& s, int64_t head, int64_t first, int64_t rows, const T* keys, const T* values, const Padding<T>& padding, Prefetch<T>& prefetch) {
    Buffer<T> q(products_.queries_size(rows_)), logits(rows_ * kKeyChunk), weights(products_.weights_size(rows_)), out(rows_ * value_row_);
    Buffer<T> factors(a_.dropout ? rows_ * kKeyChunk : 0), small(3 * rows_);
    const Running<T> running = {small.get(), small + rows_};
    T* scale_by = small + 2 * rows_;
    for (int64_t i = 0; i < rows; ++i) running.largest[i] = -kInfinity<T>, running.sum[i] = 0;
    products_.load_queries(query_rows(a_, io_, a_.q, s, head, first), rows, NormOf<T>(a_, a_.q_norm, head), q.get());
    const T scale = static_cast<T>(a_.scale);
    for (int64_t j = 0; j < s.keys; j += kKeyChunk) {
      const int64_t count = min_of(kKeyChunk, s.keys - j);
      products_.logits(rows, j, count, q.get(), keys, [&](int64_t i, int64_t c, Vec<T> acc) { store(logits + i * kKeyChunk + c * kLanes<T>, acc * scale); });
      if (a_.bias) {
        for (int64_t i = 0; i < rows; ++i) add_bias<T>(a_, s.index, head, first + i, j, count, logits + i * kKeyChunk);
      }
      if (padding) {
        for (int64_t i = 0; i < rows; ++i) padding.hide(j, count, logits + i * kKeyChunk);
      }
      const auto weigh = [&](const auto& put) {
        softmax_chunk<T>(logits, kKeyChunk, rows, count, a_.bias || padding, running, scale_by, put, [&] {
          if (j == 0) prefetch.row();
        });
      };
      if (a_.dropout) {
        dropout_factors<T>(a_, head, s.q_begin + first, rows, first_key(a_, s) + j, count, factors, kKeyChunk);
        weigh([&](int64_t i, int64_t c, Vec<T> p) { products_.put_weights(logits, weights, i, c, p * load(factors + i * kKeyChunk + c)); });
      } else {
        weigh([&](int64_t i, int64_t c, Vec<T> p) { products_.put_weights(logits, weights, i, c, p); });
      }
      products_.out(rows, j, count, s.keys, logits.get(), weights.get(), values, [&](int64_t i, int64_t c, Vec<T> acc) {
        T* at = out + i * value_row_ + c * kLanes<T>;
        store(at, j == 0 ? acc : load(at) * scale_by[i] + acc);
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T sum = running.sum[i], factor = sum == 0 ? T(0) : T(1) / sum;  // NaN stays NaN
      for (int64_t c = 0; c < value_row_; c += kLanes<T>) store(out + i * value_row_ + c, s.keys ? load(out + i * value_row_ + c) * factor : Vec<T>{});
      if (a_.lse) static_cast<double*>(a_.lse)[lse_at(a_, s, head, first + i)] = static_cast<double>(running.largest[i]) + std::log(static_cast<double>(sum));
    }
    io_.store_rows(query_rows(a_, io_, a_.out, s, head, first), rows, a_.value_dim, out, value_row_);
  }

  const Forward& a_;
  const Storage<T>& io_;
  const P products_;
  const int64_t value_row_, rows_;
};

// Rows beyond the last sequence.
template <class T>
void finish_padding(const Forward& a) {
  const int64_t first = a.cu_q[a.sequences];
  clear_rows(a, a.out, first, a.total_q, a.heads, a.value_dim);
  for (int64_t h = 0; h < a.heads; ++h) {
    for (int64_t i = first; a.lse && i < a.total_q; ++i) static_cast<double*>(a.lse)[h * a.total_q + i] = -kInfinity<double>;
  }
}

template <class T>
void forward(const Forward& a) {
  finish_padding<T>(a);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, float>) {
    if (a.dtype == Dtype::kBFloat16) return for_units(*a.schedule, [&] { return ForwardUnit<T, PairProducts>(a); });
  }
#endif
  for_units(*a.schedule, [&] { return ForwardUnit<T, Products<T>>(a); });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
