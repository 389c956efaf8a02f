// Vectors of the width of the instruction set this file is compiled for, as compiler vector extensions: one source for AVX-512, AVX2,
// baseline x86-64 and NEON. Everything lives in a namespace named after the instruction set (VITKERNELS_ISA), so the linker can never
// hand code built for one to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#ifndef VITKERNELS_ISA
#error "define VITKERNELS_ISA to the name of the instruction set"
#endif

namespace vitkernels {
namespace VITKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<uint32_t> {
  typedef uint32_t Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::Type;

template <class T>
using IndexVec = typename VectorOf<T>::Index;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
template <class T>
constexpr T min_of(T a, T b) { return a < b ? a : b; }
template <class T>
constexpr T max_of(T a, T b) { return a > b ? a : b; }

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// --- conversion of single elements --------------------------------------------------------------------------------------------------

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t fraction = value.bits & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = 0x7f800000u | fraction << 13;
  } else if (exponent != 0) {
    bits = (exponent + 112) << 23 | fraction << 13;
  } else {  // zero or subnormal: fraction * 2^-24 is exact in float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof bits);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

template <class S>
inline S from_float(float value);

template <>
inline float from_float<float>(float value) { return value; }

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: let the float adder round at the weight of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    const float shifted = absolute + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    return {static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

inline void store_scalar(double* p, double value) { *p = value; }
template <class S>
inline void store_scalar(S* p, float value) { *p = from_float<S>(value); }

// --- loads and stores of whole and partial vectors ----------------------------------------------------------------------------------

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

constexpr int kFloatLanes = kLanes<float>;
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

inline Vec<float> load(const BFloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, WordBits) << 16);
}

// The bfloat16 value of each lane in its upper 16 bits, the lower ones undefined.
inline WordBits round_to_bfloat16(Vec<float> v) {
  const WordBits bits = reinterpret_cast<WordBits>(v);
  const WordBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto is_nan = v != v;
  return is_nan ? WordBits{} + 0x7fc00000u : rounded;
}

inline void store(BFloat16* p, Vec<float> v) {
  const HalfBits half = __builtin_convertvector(round_to_bfloat16(v) >> 16, HalfBits);
  std::memcpy(p, &half, sizeof half);
}

inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  // maskz: the plain intrinsic starts from an undefined register, which gcc 12 warns about.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kFloatLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kFloatLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// The arithmetic type of a storage type.
template <class S>
using Arith = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The first n lanes; the others are zero and their memory is not touched.
template <class S>
inline Vec<Arith<S>> load_partial(const S* p, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<S, float>) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  if constexpr (sizeof(S) == 2) {
    S buffer[kFloatLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
    return load(buffer);
  }
#endif
  S buffer[kLanes<Arith<S>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(S));
  return load(buffer);
}

template <class S>
inline void store_partial(S* p, Vec<Arith<S>> v, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
  if constexpr (sizeof(S) == 2) {
    S buffer[kFloatLanes];
    store(buffer, v);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer));
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), bits);
  }
#endif
  S buffer[kLanes<Arith<S>>];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(S));
}

// --- arithmetic ---------------------------------------------------------------------------------------------------------------------

// The larger one; b where either is NaN.
template <class V>
inline V max_vec(V a, V b) {
#if defined(__AVX512F__)
  // gcc makes a comparison and a blend of the line below where a is a constant.
  if constexpr (std::is_same_v<V, Vec<float>>) return _mm512_maskz_max_ps(0xffff, a, b);  // maskz: gcc 12 warns about the plain one
#endif
  return a > b ? a : b;
}

// max(v, 0) that keeps a NaN, as torch.relu does.
template <class V>
inline V relu(V v) { return v < V{} ? V{} : v; }

#if defined(__clang__)
template <class V, class I>
inline V shuffle(V v, I index) {
  V result;
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) result[i] = v[index[i]];
  return result;
}
template <class V, class I>
inline V shuffle(V a, V b, I index) {
  constexpr size_t n = sizeof(V) / sizeof(a[0]);
  V result;
  for (size_t i = 0; i < n; ++i) result[i] = static_cast<size_t>(index[i]) < n ? a[index[i]] : b[index[i] - n];
  return result;
}
#else
template <class V, class I>
inline V shuffle(V v, I index) { return __builtin_shuffle(v, index); }
template <class V, class I>
inline V shuffle(V a, V b, I index) { return __builtin_shuffle(a, b, index); }
#endif

// Shuffle indices as compile-time constants: {f(0), f(1), ...}. Built at run time they cost more than what they steer.
template <class T, class F, int... i>
constexpr IndexVec<T> make_index(F f, std::integer_sequence<int, i...>) {
  return IndexVec<T>{f(i)...};
}
template <class T, class F>
constexpr IndexVec<T> make_index(F f) {
  return make_index<T>(f, std::make_integer_sequence<int, kLanes<T>>());
}

// Combines all lanes with op, in pairs: the same order whatever the data.
template <class T, int kStep = kLanes<T> / 2, class Op>
inline T reduce(Vec<T> v, Op op) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    constexpr IndexVec<T> partner = make_index<T>([](int i) { return i ^ kStep; });
    return reduce<T, kStep / 2>(op(v, shuffle(v, partner)), op);
  }
}

template <class T>
inline T reduce_add(Vec<T> v) { return reduce<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; }); }

template <class T>
inline T reduce_max(Vec<T> v) { return reduce<T>(v, [](Vec<T> a, Vec<T> b) { return max_vec(a, b); }); }

// Transposes a kLanes x kLanes block held in registers: log2(kLanes) stages of pairwise exchanges.
template <class T, int kStep = 1>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  if constexpr (kStep < n) {
    constexpr IndexVec<T> low = make_index<T>([](int i) { return i & kStep ? n + i - kStep : i; });
    constexpr IndexVec<T> high = make_index<T>([](int i) { return i & kStep ? n + i : i + kStep; });
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & kStep) continue;
      const Vec<T> a = rows[i], b = rows[i + kStep];
      rows[i] = shuffle(a, b, low);
      rows[i + kStep] = shuffle(a, b, high);
    }
    transpose<T, 2 * kStep>(rows);
  }
}

// e^v, within 1.02 ulp. Below -87 the result is exactly 0: a denormal there costs a microcode assist on every later use
// (masked lanes are -inf, so this is the common case, not a corner).
inline Vec<float> exp(Vec<float> v) {
  const Vec<float> clamped = v < -87.0f ? Vec<float>{} : (v > 88.5f ? broadcast(88.5f) : v);
  const Vec<float> magic = broadcast(0x1.8p23f);  // adding it rounds to the nearest integer
  const Vec<float> shifted = clamped * 0x1.715476p0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 split: the first product is exact
  Vec<float> p = broadcast(0x1.6850e4p-10f);
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r) * r + r + 1.0f;
  const auto exponent = (reinterpret_cast<IndexVec<float>>(shifted) - 0x4b400000) << 23;
  const Vec<float> result = reinterpret_cast<Vec<float>>(reinterpret_cast<IndexVec<float>>(p) + exponent);
  const Vec<float> kept = v < -87.0f ? Vec<float>{} : result;
  return v != v ? v : (v > 88.5f ? broadcast(__builtin_inff()) : kept);
}

// e^v for v <= 0, as in a softmax after its largest value is taken off, within 1 ulp for v > -10 and 4.2 ulp below: the polynomial of exp without the cases that
// cannot occur and without the low half of ln 2, which counts for less than the rounding of such a v. Below -80 the result is e^-80, which no sum that holds a 1
// can tell from 0, and which stays clear of denormals when it is normalised.
inline Vec<float> exp_nonpositive(Vec<float> v) {
  const Vec<float> clamped = max_vec(broadcast(-80.0f), v);  // in this order a NaN is kept
  const Vec<float> magic = broadcast(0x1.8p23f);
  const Vec<float> shifted = clamped * 0x1.715476p0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = clamped - n * 0x1.62e430p-1f;
  Vec<float> p = broadcast(0x1.6850e4p-10f);
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IndexVec<float>>(p) + (reinterpret_cast<IndexVec<float>>(shifted) << 23));  // magic's own bits fall off
}

// float64 exists to be exact (gradcheck, references), not fast.
inline Vec<double> exp(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::exp(v[i]);
  return v;
}
inline Vec<double> exp_nonpositive(Vec<double> v) { return exp(v); }

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
