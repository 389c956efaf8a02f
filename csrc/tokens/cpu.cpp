// Position embeddings and pooling of packed tokens (NaViT, arXiv 2307.06304) on the CPU, compiled once per instruction set. Both are bound by memory:
// each value is read once and written once. The derivation is in vitkernels/ops/tokens/README.md.
#include "tokens/pool.h"
#include "tokens/position.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void position_forward_any(const PositionForward& a) { VITKERNELS_FOR_DTYPE(position_forward) }
void position_backward_any(const PositionBackward& a) { VITKERNELS_FOR_DTYPE(position_backward) }
void pool_forward_any(const PoolForward& a) { VITKERNELS_FOR_DTYPE(pool_forward) }
void pool_backward_any(const PoolBackward& a) { VITKERNELS_FOR_DTYPE(pool_backward) }

}  // namespace

const tokens::Kernels& tokens_kernels() {
  static constexpr tokens::Kernels kernels = {position_forward_any, position_backward_any, pool_forward_any, pool_backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
