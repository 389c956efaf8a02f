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

// Where sequences begin. Packed: one after the other, sequence s at row cu[s] of the tensor. Else each is an image of the batch, image_stride further on, or one of
// the height * width positions in the patches of a map: its rows are the pixels at that position, `line` of them side by side (0: all).
struct Places {
  bool packed;
  int64_t height, width, line;
};

// What both directions need. Query i of sequence s, row cu_q[s] + i of all, sees the keys cu_k[s] .. cu_k[s] + used(s) - 1, and behind them the shared ones.
struct Attention {
  Dtype dtype;
  Places places;
  int64_t sequences, total_q, total_k, heads, kv_heads, dim, value_dim;
  const int32_t *cu_q, *cu_k, *used_k;  // used_k null: all keys
  Rows q, k, v;
  int64_t shared;                // keys that all sequences see, [shared, kv_heads, dim] and [shared, kv_heads, value_dim], contiguous
  const void *shared_k, *shared_v;
  const uint8_t* key_padding;    // [sequences, keys], contiguous, 0 where a key is padding, or null; only keys in use are looked at
  const void* bias;              // accumulation type [sequences, heads, M_q, M_k] under these strides, or null
  int64_t bias_sequence_stride, bias_head_stride, bias_row_stride, bias_column_stride;  // the last one 1, or 0 for one number a row
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
  Rows out;
  void* lse;  // double [heads, total_q]; not packed: [sequences, heads, queries]; or null
};

// Pointers of gradients that are not wanted are null.
struct Backward : Attention {
  Rows grad_out;          // data null: zero
  const void* grad_lse;   // double, contiguous, null: zero
  const void* lse;
  Rows grad_q, grad_k, grad_v;
  void *grad_shared_k, *grad_shared_v;  // contiguous, of the storage type
  void* grad_bias;        // accumulation type, zero at entry, under these strides; the units of one batch of the schedule write to places of their own
  int64_t grad_bias_sequence_stride, grad_bias_head_stride, grad_bias_row_stride, grad_bias_column_stride;
  int64_t grad_bias_sequences;  // that one part of the gradient sums over
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
