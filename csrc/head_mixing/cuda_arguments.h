// The arguments of Re-Attention's CUDA kernels and where a block keeps what, plain data for both sides of a launch and for the host tests.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace vitkernels::head_mixing::cuda {

constexpr int kMaxHeads = 16;  // the mix is one step of the tensor cores, 16 x 16
constexpr int kMaxDim = 64;    // of the heads of q and k; v may have any
constexpr int kKeyGroups = 4;  // of 8 keys: a tile of keys has 32
constexpr int kKeys = 8 * kKeyGroups;
constexpr int kLseWarps = 4, kLseQueries = 16 * kLseWarps, kLseKeys = 64;
constexpr int kLargestShared = 227 * 1024;  // that a block has on any GPU
constexpr double kLog2E = 1.4426950408889634;

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

// The same as the rows' kernel takes them: what it computes are `scale` times smaller maps.
struct alignas(16) Folded {
  Float16 mix[kMaxHeads][kMaxHeads];
  Float16 rest[kMaxHeads][kMaxHeads];  // what float16 rounded off the mix
  float start[kMaxHeads];              // added to the mixed maps
  float weight[kMaxHeads], bias[kMaxHeads];  // of a layer norm
  float scale, eps;
};

struct Arguments {
  Rows q, k, v;
  int64_t batch;
  int heads, tokens, value_dim;
  float scale_log2;  // of the logits, times log2(e)
  double* lse;       // [B, H, N]
  void* out;         // [B, H, N, value_dim], in memory [B, N, H, value_dim]
  Small small;
  Folded* folded;
  bool lse_is_known;
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
  static constexpr int kQ = 0, kK = kHeads * kQueries * kRow, kV = kK + kHeads * kKeys * kRow, kMaps = kV + kHeads * kKeys * kRow;
  static constexpr int kExchanges = kMaps + kHeads * kMapHead, kLse = kExchanges + kWarps * kExchange, kFolded = kLse + kHeads * kQueries * 4;
  static constexpr int kShared = kFolded + static_cast<int>(sizeof(Folded));
};

// How long the blocks of a plan take together, in arbitrary units. On an H200 up to eight warps on a multiprocessor hide each other's waits and take as
// long as four; sixteen take nearly twice as long.
constexpr int64_t kNever = int64_t{1} << 62;
template <class Plan>
VITKERNELS_HD int64_t time_of(int64_t blocks, int multiprocessors, int shared_limit) {
  if (Plan::kShared > shared_limit) return kNever;
  const int64_t beside = shared_limit / (Plan::kShared + 1024), places = multiprocessors * (beside > 0 ? beside : 1);
  const int64_t warps = Plan::kWarps * (beside > 0 ? beside : 1);
  return (blocks + places - 1) / places * (warps > 8 ? 10 * warps : 84);
}

// Heads there is room for, steps of 16 columns: what the kernels are compiled for.
VITKERNELS_HD int room_for(int heads) { return heads <= 8 ? 8 : heads <= 12 ? 12 : 16; }
VITKERNELS_HD int steps_of(int dim, int value_dim) { return dim <= 32 && value_dim <= 32 ? 2 : 4; }

// What the smallest block needs of shared memory.
VITKERNELS_HD int least_shared(int heads, int dim, int value_dim) {
  const bool two = steps_of(dim, value_dim) == 2;
  switch (room_for(heads)) {
    case 8: return two ? Plan<8, 2, 1>::kShared : Plan<8, 4, 1>::kShared;
    case 12: return two ? Plan<12, 2, 1>::kShared : Plan<12, 4, 1>::kShared;
    default: return two ? Plan<16, 2, 1>::kShared : Plan<16, 4, 1>::kShared;
  }
}

}  // namespace vitkernels::head_mixing::cuda
