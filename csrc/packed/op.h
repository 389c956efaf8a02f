// The packed op as PyTorch calls it. The schema, and every check with a full message, is in vitkernels/ops/packed/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> varlen_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k,
    const OptionalTensor& work, const OptionalTensor& bias, const OptionalTensor& q_norm_weight, const OptionalTensor& q_norm_bias,
    const OptionalTensor& k_norm_weight, const OptionalTensor& k_norm_bias, int64_t qk_norm, double norm_eps, double scale, double dropout_p,
    const OptionalTensor& seed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& work, const OptionalTensor& bias,
    const OptionalTensor& q_norm_weight, const OptionalTensor& q_norm_bias, const OptionalTensor& k_norm_weight, const OptionalTensor& k_norm_bias,
    int64_t qk_norm, double norm_eps, double scale, double dropout_p, const OptionalTensor& seed, bool need_q, bool need_k, bool need_v, bool need_bias,
    bool need_norm);

}  // namespace vitkernels
