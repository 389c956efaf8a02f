// A warp's registers, loops, shared memory and tensor-core product, for nvcc and, as an emulation, for a C++ compiler.
//
// Kernel code is written against this page only: a value that each lane has its own of is a Lanes, and what each lane does is a function given to
// each_lane. Under nvcc a Lanes is the lane's registers and each_lane a plain call. For a C++ compiler a Lanes holds all 32 lanes and each_lane is a
// loop, and a block's warps run one after the other between barriers: the host tests run the kernels' own code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VITKERNELS_DEVICE __device__ __forceinline__
#define VITKERNELS_UNROLL _Pragma("unroll")
#define VITKERNELS_ROLLED _Pragma("unroll 1")
#else
#include "common/simd.h"
#define VITKERNELS_DEVICE inline
#define VITKERNELS_UNROLL
#define VITKERNELS_ROLLED
#endif

namespace vitkernels::cuda {

// --- elements -------------------------------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
VITKERNELS_DEVICE float to_float(float value) { return value; }
VITKERNELS_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
VITKERNELS_DEVICE float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
VITKERNELS_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return {__half_as_ushort(__float2half_rn(value))};
  }
}
#else
using VITKERNELS_ISA::from_float;
using VITKERNELS_ISA::to_float;
#endif

// Two neighbours in memory, loaded and stored as one.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
VITKERNELS_DEVICE Pair<T> pair_of(float first, float second) {
  return {from_float<T>(first), from_float<T>(second)};
}
// Both in one register, the first one in the low half.
template <class T>
VITKERNELS_DEVICE uint32_t bits_of(const Pair<T>& pair) {
  return pair.first.bits | static_cast<uint32_t>(pair.second.bits) << 16;
}
template <class T>
VITKERNELS_DEVICE uint32_t packed(float first, float second) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, Float16>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  return bits_of(pair_of<T>(first, second));
#endif
}
template <class T>
VITKERNELS_DEVICE Pair<T> load_pair(const T* p) {
  return *reinterpret_cast<const Pair<T>*>(p);
}
template <class T>
VITKERNELS_DEVICE void store_pair(T* p, float first, float second) {
  *reinterpret_cast<Pair<T>*>(p) = pair_of<T>(first, second);
}

// e^x, as exact as T can tell.
template <class T>
VITKERNELS_DEVICE float exponential(float x) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) < sizeof(float)) return __expf(x);
#endif
  return expf(x);
}

// 2^x to 2^-22, and 0 where that would be subnormal.
VITKERNELS_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// 1 / sqrt(x) to 2^-22.
VITKERNELS_DEVICE float inverse_root(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / std::sqrt(x);
#endif
}

// --- lanes and warps ------------------------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
constexpr int kLaneSlots = 1;
#else
constexpr int kLaneSlots = 32;
#endif

// count values of every lane.
template <class T, int count>
struct Lanes {
  T value[kLaneSlots][count];
  VITKERNELS_DEVICE T* operator[](int slot) { return value[slot]; }
  VITKERNELS_DEVICE const T* operator[](int slot) const { return value[slot]; }
};

// f(lane, slot) for every lane of the warp, slot being the lane's place in a Lanes.
template <class F>
VITKERNELS_DEVICE void each_lane(F&& f) {
#if defined(__CUDACC__)
  f(static_cast<int>(threadIdx.x & 31), 0);
#else
  for (int lane = 0; lane < 32; ++lane) f(lane, lane);
#endif
}

// A lane's number, but the compiler cannot know: what follows from it is computed where it is used. Otherwise all that an unrolled loop derives from
// it is computed once, at the kernel's start, and waits in more registers than there are.
VITKERNELS_DEVICE int afresh(int lane) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

// f(i) for i below count, the lanes of the warp taking turns.
template <class F>
VITKERNELS_DEVICE void lanes_over(int count, F&& f) {
  each_lane([&](int lane, int) {
    for (int i = lane; i < count; i += 32) f(i);
  });
}

// f(i) for i below count, the threads of a block of kWarps warps taking turns.
template <int kWarps, class F>
VITKERNELS_DEVICE void threads_over(int warp, int count, F&& f) {
  each_lane([&](int lane, int) {
    for (int i = 32 * warp + lane; i < count; i += 32 * kWarps) f(i);
  });
}

// Each lane's values, one for each row it has a part of, joined over the four lanes that share the row.
template <int count, class F>
VITKERNELS_DEVICE void join_rows(Lanes<float, count>& v, F&& join) {
#if defined(__CUDACC__)
  VITKERNELS_UNROLL
  for (int i = 0; i < count; ++i) {
    v[0][i] = join(v[0][i], __shfl_xor_sync(0xffffffffu, v[0][i], 1));
    v[0][i] = join(v[0][i], __shfl_xor_sync(0xffffffffu, v[0][i], 2));
  }
#else
  for (int quad = 0; quad < 32; quad += 4) {
    for (int i = 0; i < count; ++i) {
      const float all = join(join(v[quad][i], v[quad + 1][i]), join(v[quad + 2][i], v[quad + 3][i]));
      for (int lane = quad; lane < quad + 4; ++lane) v[lane][i] = all;
    }
  }
#endif
}
template <int count>
VITKERNELS_DEVICE void row_max(Lanes<float, count>& v) {
  join_rows(v, [](float a, float b) { return fmaxf(a, b); });
}
template <int count>
VITKERNELS_DEVICE void row_sum(Lanes<float, count>& v) {
  join_rows(v, [](float a, float b) { return a + b; });
}

// --- the product ----------------------------------------------------------------------------------------------------------------------------

// float32 products are split, x = high + low in TF32, and the three larger of the four partial products are added (3xTF32): an operand is then known
// to 2^-22, where one TF32 product would know it to 2^-11. The tensor core rounds its sums towards zero, which over a long sum drifts to several
// times the error of FP32 arithmetic (6.5 times in the emulation below), so each step's sum starts from zero and is added outside, rounded to nearest
// (Ootomo and Yokota, arXiv 2203.03341). Plain FP32 multiply-adds would be exact enough, too, but they need each operand in four lanes where the
// tensor core has it in one: a second set of fragments, for less speed.
#if defined(__CUDACC__)
VITKERNELS_DEVICE uint32_t tf32(float value) {
  uint32_t result;
  // volatile: not to be taken out of a loop over columns, where the halves of a whole row of scores would need more registers than there are.
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}
VITKERNELS_DEVICE uint32_t tf32_rest(float value, uint32_t high) { return tf32(value - __uint_as_float(high)); }

VITKERNELS_DEVICE void mma_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b + c; c may be d.
template <class T>
VITKERNELS_DEVICE void mma_16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const float* c) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}
#else
// Round to 10 bits of fraction, ties away from zero, as cvt.rna does.
inline float tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float tf32_rest(float value, float high) { return tf32(value - high); }

// The emulated tensor core: products exact, their sum rounded towards zero, which is the least that the hardware does.
inline float truncated(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// D = A B + D by the register tables of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and ".m16n8k8"): written down here a second time, on
// purpose. a(lane, register), b(lane, register) are 16-bit pairs' halves for depth 16 (a0..a7, b0..b3) and TF32 values for depth 8 (a0..a3, b0..b1).
template <int depth, class A, class B>
inline void emulated_mma(Lanes<float, 4>& d, const A& a, const B& b) {
  float left[16][depth], right[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    if constexpr (depth == 16) {
      for (int i = 0; i < 8; ++i) left[group + (i % 4 < 2 ? 0 : 8)][in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)] = a(lane, i);
      for (int i = 0; i < 4; ++i) right[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = b(lane, i);
    } else {
      for (int i = 0; i < 4; ++i) left[group + (i % 2 == 0 ? 0 : 8)][in_group + (i < 2 ? 0 : 4)] = a(lane, i);
      for (int i = 0; i < 2; ++i) right[in_group + 4 * i][group] = b(lane, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      double sum = d[lane][i];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
      d[lane][i] = truncated(sum);
    }
  }
}
#endif

// c [16 x 16] += a [16 x 16] b [16 x 16] on the tensor cores, accumulated in float32. c and b are two halves of 8 columns; what a lane holds is in
// schedule.h.
template <class T>
VITKERNELS_DEVICE void mma(Lanes<float, 4>* c, const Lanes<Pair<T>, 4>& a, const Lanes<Pair<T>, 2>* b) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, float>) {
    // Depth 16 is two steps of depth 8. The hardware's depths t and t + 4 of step j are the neighbours 2t + 8j and 2t + 8j + 1: any order will do
    // that A and B share.
    VITKERNELS_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float a_values[4] = {a[0][2 * j].first, a[0][2 * j + 1].first, a[0][2 * j].second, a[0][2 * j + 1].second};
      uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
      VITKERNELS_UNROLL
      for (int i = 0; i < 4; ++i) a_high[i] = tf32(a_values[i]), a_low[i] = tf32_rest(a_values[i], a_high[i]);
      VITKERNELS_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float b_values[2] = {b[h][0][j].first, b[h][0][j].second};
        VITKERNELS_UNROLL
        for (int i = 0; i < 2; ++i) b_high[i] = tf32(b_values[i]), b_low[i] = tf32_rest(b_values[i], b_high[i]);
        float low[4] = {}, high[4] = {};
        mma_tf32(low, a_low, b_high);
        mma_tf32(low, a_high, b_low);
        mma_tf32(high, a_high, b_high);
        VITKERNELS_UNROLL
        for (int i = 0; i < 4; ++i) c[h][0][i] += high[i] + low[i];
      }
    }
  } else {
    const uint32_t left[4] = {bits_of(a[0][0]), bits_of(a[0][1]), bits_of(a[0][2]), bits_of(a[0][3])};
    VITKERNELS_UNROLL
    for (int h = 0; h < 2; ++h) mma_16<T>(c[h][0], left, bits_of(b[h][0][0]), bits_of(b[h][0][1]), c[h][0]);
  }
#else
  const auto half = [](const Pair<T>& pair, int i) { return to_float(i & 1 ? pair.second : pair.first); };
  for (int h = 0; h < 2; ++h) {
    if constexpr (std::is_same_v<T, float>) {
      for (int j = 0; j < 2; ++j) {
        const auto a_value = [&](int lane, int i) { return half(a[lane][2 * j + i % 2], i / 2); };
        const auto b_value = [&](int lane, int i) { return half(b[h][lane][j], i); };
        const auto a_high = [&](int lane, int i) { return tf32(a_value(lane, i)); };
        const auto b_high = [&](int lane, int i) { return tf32(b_value(lane, i)); };
        const auto a_low = [&](int lane, int i) { return tf32_rest(a_value(lane, i), a_high(lane, i)); };
        const auto b_low = [&](int lane, int i) { return tf32_rest(b_value(lane, i), b_high(lane, i)); };
        Lanes<float, 4> low{}, high{};
        emulated_mma<8>(low, a_low, b_high);
        emulated_mma<8>(low, a_high, b_low);
        emulated_mma<8>(high, a_high, b_high);
        for (int lane = 0; lane < 32; ++lane) {
          for (int e = 0; e < 4; ++e) c[h][lane][e] += high[lane][e] + low[lane][e];
        }
      }
    } else {
      emulated_mma<16>(c[h], [&](int lane, int i) { return half(a[lane][i / 2], i); }, [&](int lane, int i) { return half(b[h][lane][i / 2], i); });
    }
  }
#endif
}

// --- fragments in registers ---------------------------------------------------------------------------------------------------------------------

// The same product with 16-bit elements in pairs: d [16 x 8] = c + a [16 x 16] b [16 x 8], b being registers first and first + 1. c may be d.
template <class T, int count>
VITKERNELS_DEVICE void mma(Lanes<float, 4>& d, const Lanes<uint32_t, 4>& a, const Lanes<uint32_t, count>& b, int first, const Lanes<float, 4>& c) {
#if defined(__CUDACC__)
  mma_16<T>(d[0], a[0], b[0][first], b[0][first + 1], c[0]);
#else
  const auto half = [](uint32_t pair, int i) { return to_float(T{static_cast<uint16_t>(i & 1 ? pair >> 16 : pair)}); };
  d = c;
  emulated_mma<16>(
      d, [&](int lane, int i) { return half(a[lane][i / 2], i); }, [&](int lane, int i) { return half(b[lane][first + i / 2], i); });
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address, of 16 bytes, of row l % 8 of matrix l / 8. Register m then
// holds, of matrix m, the neighbours 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
template <bool kTransposed, class F>
VITKERNELS_DEVICE void load_matrices(Lanes<uint32_t, 4>& r, F&& row) {
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row(static_cast<int>(threadIdx.x & 31))));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0][0]), "=r"(r[0][1]), "=r"(r[0][2]), "=r"(r[0][3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0][0]), "=r"(r[0][1]), "=r"(r[0][2]), "=r"(r[0][3])
                 : "r"(address));
  }
#else
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], row(8 * m + i), sizeof matrix[i]);
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint16_t low = kTransposed ? matrix[minor][major] : matrix[major][minor];
      const uint16_t high = kTransposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
      r[lane][m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
#endif
}

// What this warp's lanes wrote to shared memory can be read by all of them.
VITKERNELS_DEVICE void warp_barrier() {
#if defined(__CUDACC__)
  __syncwarp();
#endif
}

// 16 bytes from global to shared memory, or zeros where there are none; the thread goes on meanwhile. copies_landed waits for all that it started.
VITKERNELS_DEVICE void start_copy(void* shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
#endif
}
VITKERNELS_DEVICE void copies_landed() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace vitkernels::cuda
