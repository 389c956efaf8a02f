// Cascaded group attention (EfficientViT, arXiv 2305.07027) on the CPU, compiled once per instruction set. The derivation is in
// vitkernels/ops/cascaded_group/README.md; in short, for the tokens of one window and head i:
//
//   f_i = x_i + out_(i-1);   q, k, v = W_i f_i + b_i;   q' = depthwise(q)
//   out_i = softmax(q'^T k * scale + bias_i) v
//   y = W_p relu(out_0 ... out_(H-1)) + b_p
#include "cascaded_group/backward.h"
#include "cascaded_group/batch_norm.h"
#include "cascaded_group/forward.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

void forward_any(const Forward& a) { a.dtype == Dtype::kFloat64 ? forward<double>(a) : forward<float>(a); }
void backward_any(const Backward& a) { a.dtype == Dtype::kFloat64 ? backward<double>(a) : backward<float>(a); }
void norm_forward_any(const NormForward& a) { a.dtype == Dtype::kFloat64 ? norm_forward<double>(a) : norm_forward<float>(a); }
void norm_backward_any(const NormBackward& a) { a.dtype == Dtype::kFloat64 ? norm_backward<double>(a) : norm_backward<float>(a); }

}  // namespace

const cascaded_group::Kernels& cascaded_group_kernels() {
  static constexpr cascaded_group::Kernels kernels = {forward_any, backward_any, norm_forward_any, norm_backward_any};
  return kernels;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
