// Separable self-attention (MobileViTv2, arXiv 2206.02680) on the CPU, compiled once per instruction set. The derivation is in
// vitkernels/ops/separable/README.md; in short, for the pixels n of one group (sample b, position p):
//
//   pooled  = sum_n softmax(w_q x + b_q)_n x_n        the keys are never projected per token
//   context = W_k pooled + b_k
//   y       = W_o (relu(W_v x + b_v) * context) + b_o   one pass over tiles of tokens, activations in cache
#include "separable/backward.h"
#include "separable/core.h"
#include "separable/forward.h"
#include "separable/layer.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace separable;

void core_forward_any(const CoreForward& a) { VITKERNELS_FOR_DTYPE(core_forward) }
void core_backward_any(const CoreBackward& a) { VITKERNELS_FOR_DTYPE(core_backward) }
void self_forward_any(const SelfForward& a) { VITKERNELS_FOR_DTYPE(self_forward) }
void self_backward_any(const SelfBackward& a) { VITKERNELS_FOR_DTYPE(self_backward) }
void layer_forward_any(const Layer& a) { VITKERNELS_FOR_DTYPE(layer_forward) }

}  // namespace

const separable::Kernels& separable_kernels() {
  static constexpr separable::Kernels kernels = {core_forward_any, core_backward_any, self_forward_any, self_backward_any, layer_forward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
