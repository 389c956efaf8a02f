// The tile product every fused kernel is built from: a few token columns at a time, with the epilogue in registers.
//
//   epilogue(row, vector, acc)   acc = sum_k A[row, k] * B[k, lanes of that vector]
//
// A is read one element at a time (broadcast) under any two strides, so a weight and its transpose need no packing. B is a dense panel of whole vectors,
// usually a tile of tokens in the L1 cache; where it is a weight it may be stored in 16 bits, which are widened as they are read. On a tile of two vectors
// the loop runs at the FMA rate of the core; packing A gains nothing (measured at K = 128 to 512).
//
// With AVX-512's bfloat16 products A may hold bfloat16, and B pairs: its element (k, n) is 32 bits, rows 2k (low half) and 2k + 1 (high half) of the panel.
// A step of depth then takes two elements of A, and the sums are float.
#pragma once

#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {

// Rows of A per register block: 8 x 2 accumulators with 32 vector registers, 6 x 2 with 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 6;
#endif

// One step of a product whose left operand is stored as A: sum + left * right.
template <class A, class T = Arith<A>>
inline Vec<T> multiply_add(Vec<T> sum, Vec<T> left, Vec<T> right) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<A, BFloat16>) {
    return reinterpret_cast<Vec<T>>(_mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right)));
  }
#endif
  return sum + left * right;
}

template <class A>
inline Vec<Arith<A>> broadcast_left(const A* a) {
  if constexpr (std::is_same_v<A, BFloat16>) {
    float pair;
    std::memcpy(&pair, a, sizeof pair);
    return broadcast(pair);
  } else {
    return broadcast(*a);
  }
}

template <class B>
inline auto load_right(const B* b) {
  if constexpr (std::is_same_v<B, uint32_t>) {
    return load(reinterpret_cast<const float*>(b));  // a pair a lane, whatever the lane's type
  } else {
    return load(b);
  }
}

// The inner loop, a function of its own and never inlined: beside an epilogue the compiler runs out of integer registers for the rows' addresses and
// keeps them in vector registers or on the stack, in the way of the FMAs (measured: 0.7 of the rate). Handing the sums over in memory costs
// 2 * kRows * kVectors accesses for depth * kRows * kVectors FMAs.
//
// out [kRows][kVectors]: the sums, added to what is there if `add`. With kAhead the cache is told of what is to be read next, `ahead_step` bytes a step.
template <int kRows, int kVectors, bool kAhead, class A, class B>
__attribute__((noinline)) void gemm_block(
    int64_t depth, const A* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, Vec<Arith<A>>* out, bool add, const char* ahead, int64_t ahead_step) {
  using T = Arith<A>;
  // The sums of one or two rows would wait for one another: each is kept in four parts. From three rows on every sum is made in the same order, so that a row's
  // result does not depend on how many others there are.
  constexpr int kParts = kRows <= 2 ? 4 : 1;
  Vec<T> acc[kParts][kRows][kVectors] = {};
  const auto step = [&](int64_t k, Vec<T> (&sums)[kRows][kVectors]) __attribute__((always_inline)) {
    if constexpr (kAhead) __builtin_prefetch(ahead + k * ahead_step);
    Vec<T> columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load_right(b + k * b_row + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> value = broadcast_left(a + i * a_row + k * a_col);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add<A>(sums[i][j], value, columns[j]);
    }
  };
  int64_t k = 0;
  for (; k + kParts <= depth; k += kParts) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) step(k + p, acc[p]);
  }
  for (; k < depth; ++k) step(k, acc[0]);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vec<T> sum = acc[0][i][j];
      if constexpr (kParts == 4) sum = (sum + acc[1][i][j]) + (acc[2][i][j] + acc[3][i][j]);
      acc[0][i][j] = sum;
    }
  }
  if (add) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[0][i][j] += out[i * kVectors + j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) out[i * kVectors + j] = acc[0][i][j];
  }
}

// gemm_block of 1 to kBlockRows rows.
template <int kVectors, bool kAhead = false, class A, class B>
inline void gemm_rows(
    int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, Vec<Arith<A>>* out, bool add = false,
    const char* ahead = nullptr, int64_t ahead_step = 0) {
  if (rows == kBlockRows) return gemm_block<kBlockRows, kVectors, kAhead>(depth, a, a_row, a_col, b, b_row, out, add, ahead, ahead_step);
  [&]<int... i>(std::integer_sequence<int, i...>) {
    constexpr decltype(&gemm_block<1, kVectors, kAhead, A, B>) of_rows[] = {gemm_block<i + 1, kVectors, kAhead, A, B>...};
    of_rows[rows - 1](depth, a, a_row, a_col, b, b_row, out, add, ahead, ahead_step);
  }(std::make_integer_sequence<int, kBlockRows - 1>());
}

// block(first, count) for blocks of rows that cover [0, rows): full ones and a rest of three rows or more, if there are as many. There is one call, so that the
// block is compiled into the loop: what it captures would have to be read again after every store otherwise.
template <class Block>
inline void for_row_blocks(int64_t rows, const Block& block) {
  for (int64_t row = 0, count; row < rows; row += count) {
    const int64_t left = rows - row;
    count = left == kBlockRows || left > kBlockRows + 2 ? kBlockRows : left > kBlockRows ? left / 2 : left;
    block(row, count);
  }
}

// epilogue(row, vector, sum) for sums [rows][kVectors] that begin at (first, vector).
template <int kVectors, class V, class Epilogue>
inline void finish_rows(const V* sums, int64_t first, int64_t rows, int64_t vector, const Epilogue& epilogue) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kVectors; ++j) epilogue(first + i, vector + j, sums[i * kVectors + j]);
  }
}

template <int kVectors, class A, class B, class Epilogue>
inline void gemm_columns(
    int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, int64_t vector, Epilogue epilogue) {
  for_row_blocks(rows, [&](int64_t row, int64_t count) {
    Vec<Arith<A>> sums[kBlockRows * kVectors];
    gemm_rows<kVectors>(count, depth, a + row * a_row, a_row, a_col, b, b_row, sums);
    finish_rows<kVectors>(sums, row, count, vector, epilogue);
  });
}

// Products that one running sum takes where a sum may be long. Its rounding grows with its length: at a depth of 1536, in one chain, to four times that
// of PyTorch's sums, which are made of parts, too.
constexpr int64_t kChain = 128;
// Rows for which a part of a panel, kChain steps deep, is read from the L1 cache, where their sums are as well.
constexpr int64_t kStripRows = 64;

// While the rows go through one part, the next one, which lies behind it in memory (and behind a panel's last the next panel's first), is brought in.
template <int kVectors, class A, class B, class Epilogue>
inline void gemm_columns_in_parts(
    int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, int64_t vector, Epilogue epilogue) {
  constexpr int64_t width = kVectors * kVectorBytes;
  const int64_t strip = ceil_div(rows, max_of<int64_t>(ceil_div(rows, kStripRows), 1));
  for (int64_t first = 0; first < rows; first += strip) {
    Vec<Arith<A>> sums[kStripRows * kVectors];
    const int64_t own = min_of(strip, rows - first);
    for (int64_t k = 0; k == 0 || k < depth; k += kChain) {
      const int64_t steps = min_of(kChain, depth - k);
      const char* ahead = reinterpret_cast<const char*>(b + (k + steps) * b_row);
      for_row_blocks(own, [&](int64_t row, int64_t count) {
        const A* left = a + (first + row) * a_row + k * a_col;
        gemm_rows<kVectors, true>(
            count, steps, left, a_row, a_col, b + k * b_row, b_row, sums + row * kVectors, k > 0, ahead + row * width * steps / own, ceil_div(count * width, own));
        if (k + steps == depth) finish_rows<kVectors>(sums + row * kVectors, first + row, count, vector, epilogue);
      });
    }
  }
}

template <bool kInParts, class A, class B, class Epilogue>
inline void gemm_by_columns(
    int64_t rows, int64_t depth, int64_t vectors, const A* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, const Epilogue& epilogue) {
  const auto columns = [&]<int kVectors>(int64_t vector) {
    const B* panel = b + vector * kLanes<Arith<A>>;
    if constexpr (kInParts) {
      gemm_columns_in_parts<kVectors>(rows, depth, a, a_row, a_col, panel, b_row, vector, epilogue);
    } else {
      gemm_columns<kVectors>(rows, depth, a, a_row, a_col, panel, b_row, vector, epilogue);
    }
  };
  int64_t vector = 0;
  for (; vector + 2 <= vectors; vector += 2) columns.template operator()<2>(vector);
  if (vector < vectors) columns.template operator()<1>(vector);
}

// rows x (vectors * lanes) results of depth `depth`; B has `vectors` whole vectors a row.
template <class T, class S, class Epilogue>
inline void gemm(
    int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_row, int64_t a_col, const S* b, int64_t b_row, const Epilogue& epilogue) {
  gemm_by_columns<false>(rows, depth, vectors, a, a_row, a_col, b, b_row, epilogue);
}

// The same for a deep A whose rows are dense: its sums are made of parts. A bfloat16 A goes with pairs.
template <class A, class B, class Epilogue>
inline void gemm_in_parts(int64_t rows, int64_t depth, int64_t vectors, const A* a, int64_t a_row, const B* b, int64_t b_row, const Epilogue& epilogue) {
  gemm_by_columns<true>(rows, depth, vectors, a, a_row, std::is_same_v<A, BFloat16> ? 2 : 1, b, b_row, epilogue);
}

#if defined(__AVX512BF16__)

// The same for bfloat16 and pairs: A's rows are dense, of 2 * depth_pairs elements.
template <class Epilogue>
inline void gemm_bf16(
    int64_t rows, int64_t depth_pairs, int64_t vectors, const BFloat16* a, int64_t a_row, const uint32_t* b, int64_t b_row, const Epilogue& epilogue) {
  gemm_by_columns<false>(rows, depth_pairs, vectors, a, a_row, 2, b, b_row, epilogue);
}

#endif  // __AVX512BF16__

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
