// Chains of layers of a convolutional network on the CPU, compiled once per instruction set. What each layer computes is in vitkernels/ops/chain/reference.py.
#include "chain/run.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void run_any(const chain::Chain& a) { VITKERNELS_FOR_DTYPE(run) }

}  // namespace

const chain::Kernels& chain_kernels() {
#if defined(__AVX512BF16__)
  constexpr bool pairs = true;
#else
  constexpr bool pairs = false;
#endif
  static constexpr chain::Kernels kernels = {run_any, pairs};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
