// The matching family's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vitkernels::matching {

// What all decoder layers say of the images of a batch, and the targets of those images.
struct Detection {
  Dtype dtype;
  int64_t layers, images, queries, classes, targets;
  const void *logits, *boxes;  // rows of `classes` and of 4 neighbouring values, under these strides
  int64_t logits_layer, logits_image, logits_query, boxes_layer, boxes_image, boxes_query;
  const int64_t* labels;     // [targets], each in [0, classes)
  const void* target_boxes;  // [targets][4] in the arithmetic type, as boxes (centre x, centre y, width, height)
  bool focal;
  double alpha, gamma;
};

struct Cost : Detection {
  const int32_t* cu_targets;  // image b has the targets from cu_targets[b] to cu_targets[b + 1]
  double class_weight, box_weight, overlap_weight;
  void* costs;  // [layers][targets][queries] in the arithmetic type
};

struct Loss : Detection {
  const int64_t* matches;  // [layers][images][queries]: a target or -1
  double num_boxes, eos_coef;
};

struct LossForward : Loss {
  void* losses;    // [layers][3] in the arithmetic type: class, L1, GIoU
  void* divisors;  // [layers]: what the class loss was divided by
};

struct LossBackward : Loss {
  const void *grad_losses, *divisors;
  void *grad_logits, *grad_boxes;  // contiguous, of the dtype
};

struct Kernels {
  bool (*has_negative_side)(const Detection&);  // of a prediction or a target: its corners are in the wrong order
  void (*cost)(const Cost&);
  void (*loss_forward)(const LossForward&);
  void (*loss_backward)(const LossBackward&);
};

}  // namespace vitkernels::matching

// Each instruction set's table, defined by matching/cpu.cpp compiled for it.
namespace vitkernels::baseline { const matching::Kernels& matching_kernels(); }
namespace vitkernels::avx2 { const matching::Kernels& matching_kernels(); }
namespace vitkernels::avx512 { const matching::Kernels& matching_kernels(); }
namespace vitkernels::avx512_bf16 { const matching::Kernels& matching_kernels(); }
