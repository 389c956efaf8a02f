// Inverted bottlenecks (MobileNetV2, arXiv 1801.04381) and what is left of one without its depthwise convolution, a transformer's MLP, on the CPU, compiled once
// per instruction set. The order of the work is in vitkernels/ops/bottleneck/README.md.
#include "bottleneck/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void forward_any(const Bottleneck& a) { VITKERNELS_FOR_DTYPE(forward) }

}  // namespace

const bottleneck::Kernels& bottleneck_kernels() {
#if defined(__AVX512BF16__)
  constexpr bool pairs = true;
#else
  constexpr bool pairs = false;
#endif
  static constexpr bottleneck::Kernels kernels = {forward_any, pairs};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
