// The arguments of Re-Attention's CUDA kernels and where a block keeps what, plain data for both sides of a launch and for the host tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VITKERNELS_HD __host__ __device__ constexpr
#else
#define VITKERNELS_HD constexpr
#endif

namespace vitkernels::head_mixing::cuda {

constexpr int kMaxHeads = 16;  // the mix is one step of the tensor cores, 16 x 16
constexpr int kMaxDim = 64;    // of the heads of q and k; v may have any
constexpr int kKeyGroups = 4;  // of 8 keys: a tile of keys has 32
constexpr int kKeys = 8 * kKeyGroups;

// [B, H, N, columns] with rows of whole 16 bytes that begin at multiples of 16 bytes; strides in elements.
struct Rows {
  const void* data;
  int64_t sample, head, row;
  int columns;
};

enum class Norm : int { kNone, kBatch, kLayer };

// Mix and norm as the op has them, [H, H] and [H]; null where there is none. mean and var: of a batch norm.
struct Small {
  const double *mix, *bias, *weight, *norm_bias, *mean, *var;
  Norm norm;
  double eps;
};

struct Arguments {
  Rows q, k, v;
  int64_t batch;
  int heads, tokens, value_dim;
  float scale_log2;  // of the logits, times log2(e)
  double* lse;       // [B, H, N]
  void* out;         // [B, H, N, value_dim], in memory [B, N, H, value_dim]
  Small small;
};

// A block of the kernel that writes rows: 16 kRowGroups queries, all heads, 16 kSteps columns of the output. kHeads: those there is room for.
template <int kHeads_, int kSteps_, int kRowGroups_>
struct Plan {
  static constexpr int kHeads = kHeads_, kSteps = kSteps_, kRowGroups = kRowGroups_;
  static constexpr int kWarps = kRowGroups * kKeyGroups, kQueries = 16 * kRowGroups, kColumns = 16 * kSteps;
  // Bytes from a row to the next, an odd number of 16: eight rows that are read at once then lie in different banks.
  static constexpr int kRow = 2 * kColumns + 16, kMapRow = 2 * kKeys + 16;
  static constexpr int kMapHead = kQueries * kMapRow + 16;  // four heads that are written at once do, too
  static constexpr int kExchange = 64 * 32;                 // of a warp: 64 elements of the maps, in all heads

  // Where things lie in a block's shared memory, in bytes.
  struct Places {
    int k, v, maps, exchange, lse, mix, vectors, total;  // q lies at 0
  };
  VITKERNELS_HD static Places places(int heads) {
    Places p{};
    p.k = heads * kQueries * kRow;
    p.v = p.k + heads * kKeys * kRow;
    p.maps = p.v + heads * kKeys * kRow;
    p.exchange = p.maps + heads * kMapHead;
    p.lse = p.exchange + kWarps * kExchange;
    p.mix = p.lse + kHeads * kQueries * 4;
    p.vectors = p.mix + 2 * kMaxHeads * kMaxHeads * 2;  // after the mix what float16 rounded off
    p.total = p.vectors + 4 * kMaxHeads * 4;
    return p;
  }
};

// Two or four steps of 16 columns, by what the heads have.
VITKERNELS_HD int steps_of(int dim, int value_dim) { return dim <= 32 && value_dim <= 32 ? 2 : 4; }
// What the smallest block needs.
VITKERNELS_HD int least_shared(int heads, int dim, int value_dim) {
  return steps_of(dim, value_dim) == 2 ? Plan<kMaxHeads, 2, 1>::places(heads).total : Plan<kMaxHeads, 4, 1>::places(heads).total;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr int kLseWarps = 4, kLseQueries = 16 * kLseWarps, kLseKeys = 64;

}  // namespace vitkernels::head_mixing::cuda
