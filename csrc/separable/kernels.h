// The separable family's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "bottleneck/kernels.h"
#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::separable {

// What both directions of the whole op need. A pixel (h, w) belongs to group (h % patch_h) * patch_w + w % patch_w; the softmax runs within a group.
// An unfolded [B, d, P, N] tensor is the map of height P and width N with patches (P, 1).
struct SelfAttention {
  Dtype dtype;
  int64_t batch, dim, height, width, patch_h, patch_w;
  Map x;
  const void* qkv_weight;    // [1 + 2d, d]
  const void* qkv_bias;      // [1 + 2d] or null
  const void* out_weight;    // [d, d]
  const void* score_scale;   // [B, H, W] in the accumulation type, or null
};

struct SelfForward : SelfAttention {
  const void* out_bias;  // [d] or null
  Map y;
  // In the accumulation type: [B, H, W]; [B, P, 2], the maximum and the sum of exponentials of each group's logits; [B, P, d].
  void *logits, *stats, *pooled;
};

struct SelfBackward : SelfAttention {
  Map grad_y;
  const void *logits, *stats, *pooled;
  Map grad_x;  // data null: not wanted
  void *grad_qkv_weight, *grad_qkv_bias, *grad_out_weight, *grad_out_bias;  // pairs null: not wanted
};

// q [B, 1, P, N]; k, v, and gradients [B, d, P, N]; strides by Map with height P and width N.
struct CoreForward {
  Dtype dtype;
  int64_t batch, dim, positions, patches;
  Map q, k, v;
  void* out;                // contiguous
  void *scores, *context;   // accumulation type: [B, P, N], [B, P, d]
};

struct CoreBackward {
  Dtype dtype;
  int64_t batch, dim, positions, patches;
  Map grad_out, k, v;
  const void *scores, *context;
  void *grad_q, *grad_k, *grad_v;  // contiguous; null: not wanted
};

// The attention of a transformer layer with its norm and residual, in channels_last: values, gate and output projection are an inverted bottleneck with the norm of
// samples in front, whose gate is the kernel's to make. The rest is of the arithmetic type, padded with zeros to whole panels.
struct Layer : bottleneck::Bottleneck {
  const void *query, *query_bias;     // [d], of the normalised input before its scale; [1]
  const void *key_weight, *key_bias;  // panels of depth d
};

struct Kernels {
  void (*core_forward)(const CoreForward&);
  void (*core_backward)(const CoreBackward&);
  void (*self_forward)(const SelfForward&);
  void (*self_backward)(const SelfBackward&);
  void (*layer_forward)(const Layer&);
};

}  // namespace vitkernels::separable

// Each instruction set's table, defined by separable/cpu.cpp compiled for it.
namespace vitkernels::baseline { const separable::Kernels& separable_kernels(); }
namespace vitkernels::avx2 { const separable::Kernels& separable_kernels(); }
namespace vitkernels::avx512 { const separable::Kernels& separable_kernels(); }
namespace vitkernels::avx512_bf16 { const separable::Kernels& separable_kernels(); }
