// Products with weights in panels of kPanel columns, and how what is multiplied with them is held.
#pragma once

#include "bottleneck/kernels.h"
#include "common/gemm.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// body(row, first channel, acc + bias) over whole vectors: tokens [rows][depth] times panels, which are pairs where the tokens are bfloat16. Bodies hold copies:
// what they held by reference would be read again after each store.
template <class L, class W, class T, class Body>
void times_panels(int64_t rows, int64_t depth, int64_t channels, const L* a, int64_t a_row, const W* panels, const T* bias, const Body& body) {
  using Right = std::conditional_t<std::is_same_v<L, BFloat16>, uint32_t, W>;
  constexpr int64_t lanes = kLanes<T>, step = sizeof(Right) / sizeof(W);
  for (int64_t first = 0; first < channels; first += bottleneck::kPanel, panels += bottleneck::kPanel * depth) {
    const int64_t vectors = ceil_div(min_of(channels - first, bottleneck::kPanel), lanes);
    gemm_in_parts(rows, depth / step, vectors, a, a_row, reinterpret_cast<const Right*>(panels), bottleneck::kPanel, [=](int64_t row, int64_t v, Vec<T> acc) {
      const int64_t channel = first + v * lanes;
      body(row, channel, acc + load(bias + channel));
    });
  }
}

// The distance of the rows of a left operand of so many columns: an odd number of cache lines, as the rows of a block would else fall into few sets of the L1 cache.
template <class Left>
constexpr int64_t left_row(int64_t columns) {
  constexpr int64_t line = kVectorBytes / static_cast<int64_t>(sizeof(Left));
  return (ceil_div(columns, line) | 1) * line;
}

// A vector of a left operand. The products take denormals for zeros, and so may what rounds them.
template <class T>
inline void store_left(T* p, Vec<T> v) { store(p, v); }
inline void store_left(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &half, sizeof half);
#else
  store(p, v);
#endif
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
