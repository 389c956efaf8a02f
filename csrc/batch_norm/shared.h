// What both memory formats share: the affine map of a channel, activations and their slopes, and sums that do not depend on the number of threads.
#pragma once

#include <cmath>
#include <cstring>

#include "batch_norm/kernels.h"
#include "common/activation.h"
#include "common/rows.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace batch_norm;

constexpr int64_t kSerialElements = 1 << 14;  // below, a second thread costs more than it saves
constexpr int64_t kBlockBytes = 1 << 15;      // of values whose moments are found apart, in the first cache
constexpr int64_t kSumLength = 16;            // terms that are summed in their own type; these sums are summed in float64

// body(i) for i in [0, tasks), of a map of so many elements.
template <class Body>
inline void shared_out(int64_t tasks, int64_t elements, const Body& body) {
  parallel_if(elements >= kSerialElements, tasks, body);
}

template <Activation kActivation, class T>
inline Vec<T> activate(Vec<T> v) {
  if constexpr (kActivation == Activation::kRelu) return relu(v);
  if constexpr (kActivation == Activation::kSilu) return silu<T>(v);
  return v;
}

// grad times the slope of the activation at v. Of SiLU: s (1 + v (1 - s)), s the sigmoid of v; e^-|v| gives s and 1 - s without cancellation.
template <Activation kActivation, class T>
inline Vec<T> times_slope(Vec<T> grad, Vec<T> v) {
  if constexpr (kActivation == Activation::kRelu) return v <= 0 ? Vec<T>{} : grad;  // of NaN the gradient, as in PyTorch
  if constexpr (kActivation == Activation::kSilu) {
    const Vec<T> e = exp_nonpositive(v < 0 ? v : -v), larger = T(1) / (e + T(1)), smaller = e * larger;
    return grad * ((v < 0 ? smaller : larger) * (v * (v < 0 ? larger : smaller) + T(1)));
  }
  return grad;
}

// Whether the backward's first pass leaves the gradient in front of the activation in grad_x for the second: of SiLU it is most of the arithmetic. In 16 bits it
// is rounded on the way, as PyTorch rounds it.
template <Activation kActivation>
constexpr bool kKeepsSlope = kActivation == Activation::kSilu;

// y = (x - mean) scale + bias.
template <class T, class V>
struct Affine {
  V mean, scale, bias;

  Vec<T> operator()(Vec<T> x) const { return (x - mean) * scale + bias; }
};

// sums += v, in float64.
template <class T>
inline void add_to(double* sums, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) sums[i] += static_cast<double>(v[i]);
}

template <class T>
inline T inverse_deviation(T var, double eps) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(var) + eps));
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
