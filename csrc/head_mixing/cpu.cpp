// Re-Attention (DeepViT, arXiv 2103.11886) on the CPU, compiled once per instruction set. The derivation is in vitkernels/ops/head_mixing/README.md.
#include "head_mixing/backward.h"
#include "head_mixing/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void forward_any(const Forward& a) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::kBFloat16) return forward_with<float, Pairs>(a);
#endif
  a.dtype == Dtype::kFloat64 ? forward_with<double, Plain<double>>(a) : forward_with<float, Plain<float>>(a);
}

void moments_any(const Moments& a) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::kBFloat16) return moments_with<float, Pairs>(a);
#endif
  a.dtype == Dtype::kFloat64 ? moments_with<double, Plain<double>>(a) : moments_with<float, Plain<float>>(a);
}

void backward_any(const Backward& a) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::kBFloat16) return backward_with<float, Pairs>(a);
#endif
  a.dtype == Dtype::kFloat64 ? backward_with<double, Plain<double>>(a) : backward_with<float, Plain<float>>(a);
}

}  // namespace

const head_mixing::Kernels& head_mixing_kernels() {
  static constexpr head_mixing::Kernels kernels = {forward_any, moments_any, backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
