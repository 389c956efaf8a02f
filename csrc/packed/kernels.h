// The packed family's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/map.h"
#include "packed/schedule.h"

namespace vitkernels::packed {

enum class Norm { kNone, kRms, kL2, kLayer };

// How one side's heads are normalised; weight and bias are [heads, dim] in the accumulation type, or null.
struct HeadNorm {
  const void *weight, *bias;
};

// What both directions need. Query i of sequence s, row cu_q[s] + i of q, sees the keys cu_k[s] .. cu_k[s] + used(s) - 1.
struct Attention {
  Dtype dtype;
  int64_t sequences, total_q, total_k, heads, kv_heads, dim, value_dim;
  const int32_t *cu_q, *cu_k, *used_k;  // used_k null: all keys
  Rows q, k, v;
  const void* bias;  // accumulation type [heads, M_q, M_k], columns contiguous, or null
  int64_t bias_head_stride, bias_row_stride;
  Norm norm;
  double norm_eps;
  HeadNorm q_norm, k_norm;
  double scale;
  bool dropout;
  uint64_t seed;
  uint32_t drop_limit;    // a weight is dropped where its 32 random bits are at most this
  double keep_factor;     // of the weights that are kept
  const Schedule* schedule;
};

struct Forward : Attention {
  void* out;  // contiguous [total_q, heads, value_dim]
  void* lse;  // double [heads, total_q]
};

// Pointers of gradients that are not wanted are null; those of q, k and v are contiguous.
struct Backward : Attention {
  Rows grad_out;          // data null: zero
  const void* grad_lse;   // double, contiguous, null: zero
  const void* lse;
  void *grad_q, *grad_k, *grad_v;
  void* grad_bias;        // accumulation type, contiguous [heads, bias_rows, bias_columns], zero at entry
  int64_t bias_rows, bias_columns;
  void *grad_q_weight, *grad_q_bias, *grad_k_weight, *grad_k_bias;  // accumulation type, contiguous [heads or kv_heads, dim]
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

}  // namespace vitkernels::packed

// Each instruction set's table, defined by packed/cpu.cpp compiled for it.
namespace vitkernels::baseline { const packed::Kernels& packed_kernels(); }
namespace vitkernels::avx2 { const packed::Kernels& packed_kernels(); }
namespace vitkernels::avx512 { const packed::Kernels& packed_kernels(); }
namespace vitkernels::avx512_bf16 { const packed::Kernels& packed_kernels(); }
