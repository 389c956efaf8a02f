// A thread block of the cascade's kernels: its phases, and matrix products shared between its warps. common/warp.h has what one warp does.
#pragma once

#include "cascaded_group/schedule.h"
#include "common/warp.h"

namespace vitkernels::cascaded_group::cuda {

using namespace vitkernels::cuda;

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
