// Attention of a batch as PyTorch calls it. The schema, and every check with a full message, is in vitkernels/ops/dense/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias, const OptionalTensor& key_padding, const OptionalTensor& shared_k,
    const OptionalTensor& shared_v, double scale, double dropout_p, const OptionalTensor& seed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const OptionalTensor& bias, const OptionalTensor& key_padding, const OptionalTensor& shared_k, const OptionalTensor& shared_v, double scale, double dropout_p,
    const OptionalTensor& seed, bool need_q, bool need_k, bool need_v, bool need_bias, bool need_shared_k, bool need_shared_v);

}  // namespace vitkernels
