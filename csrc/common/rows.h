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

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
