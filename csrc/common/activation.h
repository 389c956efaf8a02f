// Activations on vectors, each in one exponential and one division at most.
#pragma once

#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {

// v / (1 + e^-v). Where v is so small that e^-v would overflow, the quotient is as good as 0 beside any other value.
template <class T>
inline Vec<T> silu(Vec<T> v) {
  constexpr T least = std::is_same_v<T, float> ? -80 : -700;
  return v / (exp_nonpositive(-max_vec(broadcast(least), v)) + T(1));
}

// v * Phi(v), exact (not the tanh approximation). With h = Phi(-|v|) = e^(-v^2 / 2) R(t), t = 1 / (1 + 0.3 |v|), nothing cancels in the tail, as it does in
// 1 + erf. R is a fit of erfcx of relative error 1.5e-7 for |v| < 14; beyond, h is smaller than any float beside v.
inline Vec<float> gelu(Vec<float> v) {
  const Vec<float> magnitude = v < 0 ? -v : v;
  const Vec<float> t = 1.0f / (magnitude * 0.3f + 1.0f);
  Vec<float> r = broadcast(0x1.2441bcp-5f);
  r = r * t - 0x1.41f624p-3f;
  r = r * t + 0x1.a6a0f6p-3f;
  r = r * t - 0x1.b7d6c6p-5f;
  r = r * t + 0x1.074d74p-3f;
  r = r * t + 0x1.993d96p-4f;
  r = r * t + 0x1.ee9be8p-4f;
  r = r * t + 0x1.ea0066p-4f;
  const Vec<float> h = r * t * exp_nonpositive(v * v * -0.5f);
  return v < 0 ? v * h : v - v * h;
}

inline Vec<double> gelu(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] *= 0.5 * std::erfc(-v[i] * 0.70710678118654752440);
  return v;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
