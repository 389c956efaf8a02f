// Matching cost and set loss of detection transformers on the CPU, compiled once per instruction set. The derivation is in
// vitkernels/ops/matching/README.md.
#include "matching/cost.h"
#include "matching/loss.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

bool has_negative_side_any(const Detection& a) { VITKERNELS_FOR_DTYPE(has_negative_side) return false; }
void cost_any(const Cost& a) { VITKERNELS_FOR_DTYPE(cost) }
void loss_forward_any(const LossForward& a) { VITKERNELS_FOR_DTYPE(loss_forward) }
void loss_backward_any(const LossBackward& a) { VITKERNELS_FOR_DTYPE(loss_backward) }

}  // namespace

const matching::Kernels& matching_kernels() {
  static constexpr matching::Kernels kernels = {has_negative_side_any, cost_any, loss_forward_any, loss_backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
