// Re-Attention's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::head_mixing {

enum class Norm { kNone, kBatch, kLayer };

// What every pass needs. The maps P_h = softmax(q_h k_h^T scale), dropped where dropout says so, are mixed: Z_g = sum_h mix[g][h] P_h + mix_bias[g], and normalised.
// A batch norm is affine once its statistics are known: mix then holds mix * weight / std. `constant` is what is added to every element of the result, which
// reaches the output as constant[g] * colsum(V_g).
struct Attention {
  Dtype dtype;
  int64_t batch, heads, queries, keys, dim, value_dim;  // moments and the backward: as many queries as keys, N
  Map q, k, v;                                    // [B, H, queries or keys, D]: batch, head, token and channel strides
  Norm norm;
  const double* mix;        // [heads][heads], out by in
  const double* mix_bias;   // [heads], what is added before a layer norm
  const double* weight;     // [heads] of a layer norm
  const double* constant;   // [heads]
  double centre;            // taken off every element of P first: 1 / N for a batch norm, whose mean over nearly flat maps would swamp what is left
  double eps, scale;
  bool dropout;
  uint64_t seed;
  uint32_t drop_limit;
  double keep_factor;

  // How many elements a head's maps have; 1 of none, whose sums are all zero.
  double elements() const {
    const double count = static_cast<double>(batch) * static_cast<double>(queries) * static_cast<double>(keys);
    return count > 0 ? count : 1;
  }
};

struct Forward : Attention {
  void* out;  // [B, H, queries, D_v], in memory [B, queries, H, D_v]
  double* lse;  // contiguous [B, H, queries], or null
};

// Of the maps minus `centre`, over batch, queries and keys: sums [heads] and products [heads][heads]; lse as in Forward.
struct Moments : Attention {
  double* lse;
  double *sums, *products;
};

// The backward. `mix` holds what was given, unfolded; a batch norm is x_hat = (sum_h mix[g][h] (P_h - centre) - mean[g]) / std[g].
struct Backward : Attention {
  Map grad_out;               // [B, H, N, D_v]
  const double* lse;          // the forward's
  const double *mean, *std;   // [heads] of a batch norm
  bool live;                  // its statistics are the batch's
  void *grad_q, *grad_k, *grad_v;  // contiguous, or null where not wanted
  double *grad_mix, *grad_bias, *grad_weight, *grad_constant;  // [heads][heads] and [heads]: of mix, mix_bias, the norm's weight and bias
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*moments)(const Moments&);
  void (*backward)(const Backward&);
};

}  // namespace vitkernels::head_mixing

// Each instruction set's table, defined by head_mixing/cpu.cpp compiled for it.
namespace vitkernels::baseline { const head_mixing::Kernels& head_mixing_kernels(); }
namespace vitkernels::avx2 { const head_mixing::Kernels& head_mixing_kernels(); }
namespace vitkernels::avx512 { const head_mixing::Kernels& head_mixing_kernels(); }
namespace vitkernels::avx512_bf16 { const head_mixing::Kernels& head_mixing_kernels(); }
