// Activations on vectors, each in one exponential and one division at most.
#pragma once

#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {

// v / (1 + e^-u). Where u is so small that e^-u would overflow, the quotient is as good as 0 beside any other value.
template <class T>
inline Vec<T> times_sigmoid(Vec<T> v, Vec<T> u) {
  constexpr T least = std::is_same_v<T, float> ? -80 : -700;
  return v / (exp_nonpositive(-max_vec(broadcast(least), u)) + T(1));
}

template <class T>
inline Vec<T> silu(Vec<T> v) {
  return times_sigmoid<T>(v, v);
}

// CLIP's approximation of GELU.
template <class T>
inline Vec<T> quick_gelu(Vec<T> v) {
  return times_sigmoid<T>(v, v * T(1.702));
}

// SigLIP's: v (1 + tanh(u)) / 2 = v / (1 + e^-2u), with u = sqrt(2 / pi) (v + 0.044715 v^3).
template <class T>
inline Vec<T> gelu_tanh(Vec<T> v) {
  return times_sigmoid<T>(v, v * (v * v * T(0.044715) + T(1)) * T(1.59576912160573071176));
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
