// Rows of neighbouring values, a vector at a time, the last one partial.
#pragma once

#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// The vector at p of a row that has `left` values from there on.
template <class S>
inline Vec<Arith<S>> load_row(const S* p, int64_t left) {
  return left >= kLanes<Arith<S>> ? load(p) : load_partial(p, left);
}

template <class S>
inline void store_row(S* p, Vec<Arith<S>> v, int64_t left) {
  left >= kLanes<Arith<S>> ? store(p, v) : store_partial(p, v, left);
}

// The first `left` lanes of v, `other` in the rest.
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int64_t left, T other) {
  constexpr IndexVec<T> lane = make_index<T>([](int i) { return i; });
  using Index = std::remove_cvref_t<decltype(lane[0])>;
  return lane < static_cast<Index>(left) ? v : broadcast(other);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
