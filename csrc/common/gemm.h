// The tile product every fused kernel is built from: a few token columns at a time, with the epilogue in registers.
//
//   epilogue(row, vector, acc)   acc = sum_k A[row, k] * B[k, lanes of that vector]
//
// A is read one element at a time (broadcast) under any two strides, so a weight and its transpose need no packing. B is a dense panel of whole vectors,
// usually a tile of tokens in the L1 cache; where it is a weight it may be stored in 16 bits, which are widened as they are read. On a tile of two vectors
// the loop runs at the FMA rate of the core; packing A gains nothing (measured at K = 128 to 512).
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

template <int kRows, int kVectors, class T>
using Block = Vec<T>[kRows][kVectors];

// The inner loop, a function of its own and never inlined: beside an epilogue the compiler runs out of integer registers for the rows' addresses and
// keeps them in vector registers or on the stack, in the way of the FMAs (measured: 0.7 of the rate). Handing the block over in memory costs
// 2 * kRows * kVectors accesses for depth * kRows * kVectors FMAs.
template <int kRows, int kVectors, class T, class S>
__attribute__((noinline)) void gemm_block(
    int64_t depth, const T* a, int64_t a_row, int64_t a_col, const S* b, int64_t b_row, Block<kRows, kVectors, T>& out) {
  // So few accumulators would wait for one another: each sum is kept in four parts, which are also summed more exactly than one long chain.
  constexpr int kParts = kRows * kVectors <= 4 ? 4 : 1;
  Vec<T> acc[kParts][kRows][kVectors] = {};
  const auto step = [&](int64_t k, Vec<T> (&sums)[kRows][kVectors]) __attribute__((always_inline)) {
    Vec<T> columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load(b + k * b_row + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> value = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += value * columns[j];
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
      if constexpr (kParts == 4) {
        out[i][j] = (acc[0][i][j] + acc[1][i][j]) + (acc[2][i][j] + acc[3][i][j]);
      } else {
        out[i][j] = acc[0][i][j];
      }
    }
  }
}

// Products that one running sum takes where a sum may be long. Its rounding grows with its length: at a depth of 1536, in one chain, to four times that
// of PyTorch's sums, which are made of parts, too.
constexpr int64_t kChain = 128;

// gemm_block of any depth, as a sum of chains; neighbours in a row of A lie side by side.
template <int kRows, int kVectors, class T, class S>
inline void sum_in_parts(int64_t depth, const T* a, int64_t a_row, const S* b, int64_t b_row, Block<kRows, kVectors, T>& acc) {
  gemm_block<kRows, kVectors, T, S>(depth < kChain ? depth : kChain, a, a_row, 1, b, b_row, acc);
  for (int64_t k = kChain; k < depth; k += kChain) {
    Block<kRows, kVectors, T> part;
    gemm_block<kRows, kVectors, T, S>(depth - k < kChain ? depth - k : kChain, a + k, a_row, 1, b + k * b_row, b_row, part);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += part[i][j];
    }
  }
}

template <int kRows, int kVectors, class T, class Epilogue>
inline void finish_block(const Block<kRows, kVectors, T>& block, int64_t row, int64_t vector, Epilogue& epilogue) {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) epilogue(row + i, vector + j, block[i][j]);
  }
}

// body(rows) for blocks of rows that cover [0, rows): as many full blocks as fit, then twos and a one.
template <class Full, class Two, class One>
inline void for_row_blocks(int64_t rows, const Full& full, const Two& two, const One& one) {
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) full(row);
  for (; row + 2 <= rows; row += 2) two(row);
  if (row < rows) one(row);
}

template <int kVectors, bool kInParts, class T, class S, class Epilogue>
inline void gemm_columns(
    int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const S* b, int64_t b_row, int64_t vector, Epilogue& epilogue) {
  const auto block = [&]<int kRows>(int64_t row) {
    Block<kRows, kVectors, T> acc;
    if constexpr (kInParts) {
      sum_in_parts<kRows, kVectors, T, S>(depth, a + row * a_row, a_row, b, b_row, acc);
    } else {
      gemm_block<kRows, kVectors, T, S>(depth, a + row * a_row, a_row, a_col, b, b_row, acc);
    }
    finish_block<kRows, kVectors, T>(acc, row, vector, epilogue);
  };
  for_row_blocks(
      rows, [&](int64_t row) { block.template operator()<kBlockRows>(row); }, [&](int64_t row) { block.template operator()<2>(row); },
      [&](int64_t row) { block.template operator()<1>(row); });
}

// rows x (vectors * lanes) results of depth `depth`; B has `vectors` whole vectors a row.
template <class T, bool kInParts = false, class S, class Epilogue>
inline void gemm(
    int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_row, int64_t a_col, const S* b, int64_t b_row, Epilogue&& epilogue) {
  int64_t vector = 0;
  for (; vector + 2 <= vectors; vector += 2) {
    gemm_columns<2, kInParts>(rows, depth, a, a_row, a_col, b + vector * kLanes<T>, b_row, vector, epilogue);
  }
  if (vector < vectors) gemm_columns<1, kInParts>(rows, depth, a, a_row, a_col, b + vector * kLanes<T>, b_row, vector, epilogue);
}

// The same for a deep A whose rows are dense: its sums are made of parts.
template <class T, class S, class Epilogue>
inline void gemm_in_parts(int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_row, const S* b, int64_t b_row, Epilogue&& epilogue) {
  gemm<T, true>(rows, depth, vectors, a, a_row, 1, b, b_row, epilogue);
}

#if defined(__AVX512BF16__)

// The same for bfloat16 operands with float accumulators, two steps of depth an instruction. B holds pairs: element (k, n) of B as 32 bits is
// rows 2k (low half) and 2k + 1 (high half) of the panel; A's rows are plain bfloat16, even depth, read as pairs.
template <int kRows, int kVectors>
__attribute__((noinline)) void gemm_block_bf16(
    int64_t depth_pairs, const BFloat16* a, int64_t a_row, const uint32_t* b, int64_t b_row, Block<kRows, kVectors, float>& out) {
  __m512 acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth_pairs; ++k) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * b_row + j * kFloatLanes));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * a_row + 2 * k, sizeof pair);
      const __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], value, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) out[i][j] = reinterpret_cast<Vec<float>>(acc[i][j]);
  }
}

template <int kVectors, class Epilogue>
inline void gemm_columns_bf16(
    int64_t rows, int64_t depth_pairs, const BFloat16* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t vector, Epilogue& epilogue) {
  const auto block = [&]<int kRows>(int64_t row) {
    Block<kRows, kVectors, float> acc;
    gemm_block_bf16<kRows, kVectors>(depth_pairs, a + row * a_row, a_row, b, b_row, acc);
    finish_block<kRows, kVectors, float>(acc, row, vector, epilogue);
  };
  for_row_blocks(
      rows, [&](int64_t row) { block.template operator()<kBlockRows>(row); }, [&](int64_t row) { block.template operator()<2>(row); },
      [&](int64_t row) { block.template operator()<1>(row); });
}

template <class Epilogue>
inline void gemm_bf16(
    int64_t rows, int64_t depth_pairs, int64_t vectors, const BFloat16* a, int64_t a_row, const uint32_t* b, int64_t b_row, Epilogue&& epilogue) {
  int64_t vector = 0;
  for (; vector + 2 <= vectors; vector += 2) gemm_columns_bf16<2>(rows, depth_pairs, a, a_row, b + vector * kFloatLanes, b_row, vector, epilogue);
  if (vector < vectors) gemm_columns_bf16<1>(rows, depth_pairs, a, a_row, b + vector * kFloatLanes, b_row, vector, epilogue);
}

#endif  // __AVX512BF16__

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
