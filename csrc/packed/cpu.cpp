// Attention over packed sequences (NaViT, arXiv 2307.06304) on the CPU, compiled once per instruction set. The derivation is in
// vitkernels/ops/packed/README.md.
#include "packed/backward.h"
#include "packed/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void forward_any(const Forward& a) { a.dtype == Dtype::kFloat64 ? forward<double>(a) : forward<float>(a); }
void backward_any(const Backward& a) { a.dtype == Dtype::kFloat64 ? backward<double>(a) : backward<float>(a); }

}  // namespace

const packed::Kernels& packed_kernels() {
  static constexpr packed::Kernels kernels = {forward_any, backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
