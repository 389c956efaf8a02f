// A warp's registers, loops and tensor-core product, for nvcc and, as an emulation, for a C++ compiler.
//
// Kernel code is written against this page only: a value that each lane has its own of is a Lanes, and what each lane does is a function given to
// each_lane. Under nvcc a Lanes is the lane's registers and each_lane a plain call. For a C++ compiler a Lanes holds all 32 lanes and each_lane is a
// loop, and a block's warps run one after the other between barriers: the host tests run the kernels' own code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cascaded_group/schedule.h"
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

namespace vitkernels::cascaded_group::cuda {

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

// f(i) for i below count, the threads of the block taking turns.
template <class F>
VITKERNELS_DEVICE void threads_over(int warp, int count, F&& f) {
  each_lane([&](int lane, int) {
    for (int i = 32 * warp + lane; i < count; i += kThreads) f(i);
  });
}

// The thread block at work. A phase is f(warp) on every warp; the next one starts when all have finished.
struct Block {
  char* shared;
  char* workspace;
  int64_t index, count;  // of the grid's blocks
#if !defined(__CUDACC__)
  const int* warp_order;  // a correct phase gives the same bits in any order
#endif

  template <class F>
  VITKERNELS_DEVICE void phase(F&& f) const {
#if defined(__CUDACC__)
    f(static_cast<int>(threadIdx.x >> 5));
    __syncthreads();
#else
    for (int i = 0; i < kWarps; ++i) f(warp_order[i]);
#endif
  }

  // Where a matrix lies. Without kAnywhere it is known to be in shared memory, which the compiler then addresses as such.
  template <class T, bool kAnywhere>
  VITKERNELS_DEVICE T* at(const Matrix& matrix) const {
    if constexpr (kAnywhere) return reinterpret_cast<T*>((matrix.shared ? shared : workspace) + matrix.offset);
    return reinterpret_cast<T*>(shared + matrix.offset);
  }
};

#if !defined(__CUDACC__)
template <class F>
inline void reduce_quads(Lanes<float, 2>& v, F&& join) {
  for (int quad = 0; quad < 32; quad += 4) {
    for (int i = 0; i < 2; ++i) {
      const float all = join(join(v[quad][i], v[quad + 1][i]), join(v[quad + 2][i], v[quad + 3][i]));
      for (int lane = quad; lane < quad + 4; ++lane) v[lane][i] = all;
    }
  }
}
#endif

// Each lane's two values, one for each row it has a part of, become the maximum or the sum over the four lanes that share the row.
VITKERNELS_DEVICE void row_max(Lanes<float, 2>& v) {
#if defined(__CUDACC__)
  for (int i = 0; i < 2; ++i) {
    v[0][i] = fmaxf(v[0][i], __shfl_xor_sync(0xffffffffu, v[0][i], 1));
    v[0][i] = fmaxf(v[0][i], __shfl_xor_sync(0xffffffffu, v[0][i], 2));
  }
#else
  reduce_quads(v, [](float a, float b) { return a > b ? a : b; });
#endif
}
VITKERNELS_DEVICE void row_sum(Lanes<float, 2>& v) {
#if defined(__CUDACC__)
  for (int i = 0; i < 2; ++i) {
    v[0][i] += __shfl_xor_sync(0xffffffffu, v[0][i], 1);
    v[0][i] += __shfl_xor_sync(0xffffffffu, v[0][i], 2);
  }
#else
  reduce_quads(v, [](float a, float b) { return a + b; });
#endif
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

template <class T>
VITKERNELS_DEVICE uint32_t bits_of(const Pair<T>& pair) {
  return pair.first.bits | static_cast<uint32_t>(pair.second.bits) << 16;
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
    const uint32_t a0 = bits_of(a[0][0]), a1 = bits_of(a[0][1]), a2 = bits_of(a[0][2]), a3 = bits_of(a[0][3]);
    VITKERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float* d = c[h][0];
      const uint32_t b0 = bits_of(b[h][0][0]), b1 = bits_of(b[h][0][1]);
      if constexpr (std::is_same_v<T, BFloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
      } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
      }
    }
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

// Row blocks first, first + step, ... below count, at most kMax of them.
struct RowBlocks {
  int first, step, count;
};

// For one column block (16 columns from column0): result = start + a b, sixteen deep at a time, depth in segments. a(segment, row, k) and b(segment,
// column, k) give the pair at depths k and k + 1; start(column) the value to start a column from; store(row, column, x, y) takes the result two
// neighbours in a row at a time.
template <class T, int kMax, class A, class B, class Start, class Store>
VITKERNELS_DEVICE void warp_product(
    RowBlocks rows, int column0, int segments, int depth, const A& a, const B& b, const Start& start, const Store& store) {
  Lanes<float, 4> c[kMax][2];
  each_lane([&](int lane, int slot) {
    VITKERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int column = column0 + 8 * h + c_column(lane, 0);
      const float x = start(column), y = start(column + 1);
      VITKERNELS_UNROLL
      for (int i = 0; i < kMax; ++i) c[i][h][slot][0] = c[i][h][slot][2] = x, c[i][h][slot][1] = c[i][h][slot][3] = y;
    }
  });
  for (int segment = 0; segment < segments; ++segment) {
    for (int k = 0; k < depth; k += kTile) {
      Lanes<Pair<T>, 2> right[2];
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int h = 0; h < 2; ++h) {
          VITKERNELS_UNROLL
          for (int p = 0; p < 2; ++p) right[h][slot][p] = b(segment, column0 + 8 * h + b_column(lane), k + b_depth(lane, p));
        }
      });
      VITKERNELS_UNROLL
      for (int i = 0; i < kMax; ++i) {
        const int block = rows.first + i * rows.step;
        if (block >= rows.count) continue;
        Lanes<Pair<T>, 4> left;
        each_lane([&](int lane, int slot) {
          VITKERNELS_UNROLL
          for (int p = 0; p < 4; ++p) left[slot][p] = a(segment, kTile * block + a_row(lane, p), k + a_depth(lane, p));
        });
        mma(c[i], left, right);
      }
    }
  }
  VITKERNELS_UNROLL
  for (int i = 0; i < kMax; ++i) {
    const int block = rows.first + i * rows.step;
    if (block >= rows.count) continue;
    each_lane([&](int lane, int slot) {
      VITKERNELS_UNROLL
      for (int h = 0; h < 2; ++h) {
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; e += 2) {
          store(kTile * block + c_row(lane, e), column0 + 8 * h + c_column(lane, e), c[i][h][slot][e], c[i][h][slot][e + 1]);
        }
      }
    });
  }
}

// The whole product of row_blocks x column_blocks tiles, shared between the block's warps. kMax: row blocks that an item accumulates at once, in
// registers.
template <class T, int kMax, class A, class B, class Start, class Store>
VITKERNELS_DEVICE void block_product(
    int warp, int row_blocks, int column_blocks, int segments, int depth, const A& a, const B& b, const Start& start, const Store& store) {
  const int parts = row_parts(row_blocks, column_blocks, kMax);
  for (int item = warp; item < column_blocks * parts; item += kWarps) {
    warp_product<T, kMax>({item % parts, parts, row_blocks}, kTile * (item / parts), segments, depth, a, b, start, store);
  }
}

struct Zero {
  VITKERNELS_DEVICE float operator()(int) const { return 0; }
};

}  // namespace vitkernels::cascaded_group::cuda
