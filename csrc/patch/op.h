// MobileViT's attention as PyTorch calls it. The schema, and every check with a full message, is in vitkernels/ops/patch/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> patch_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t patch_height, int64_t patch_width, int64_t heads, double scale);

std::tuple<Tensor, Tensor, Tensor> patch_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, int64_t patch_height, int64_t patch_width,
    int64_t heads, double scale, bool need_q, bool need_k, bool need_v);

}  // namespace vitkernels
