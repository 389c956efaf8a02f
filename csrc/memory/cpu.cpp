// Attention with memory (Sandler et al., arXiv 2203.15243) on the CPU, compiled once per instruction set. The derivation is in vitkernels/ops/memory/README.md.
#include "memory/backward.h"
#include "memory/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void forward_any(const Forward& a) { a.dtype == Dtype::kFloat64 ? forward<double>(a) : forward<float>(a); }
void backward_any(const Backward& a) { a.dtype == Dtype::kFloat64 ? backward<double>(a) : backward<float>(a); }

}  // namespace

const memory::Kernels& memory_kernels() {
  static constexpr memory::Kernels kernels = {forward_any, backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
