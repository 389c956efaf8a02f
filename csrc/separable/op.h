// The separable ops as PyTorch calls them. Schemas, and every check with a full message, are in vitkernels/ops/separable/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> separable_attention(const Tensor& q, const Tensor& k, const Tensor& v);

std::tuple<Tensor, Tensor, Tensor> separable_attention_backward(
    const Tensor& grad_out, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& context, bool need_q, bool need_k, bool need_v);

std::tuple<Tensor, Tensor, Tensor, Tensor> separable_self_attention(
    const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const std::optional<Tensor>& out_bias,
    const std::optional<Tensor>& score_scale, int64_t patch_h, int64_t patch_w);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> separable_self_attention_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& out_weight,
    const std::optional<Tensor>& score_scale, const Tensor& logits, const Tensor& stats, const Tensor& pooled, int64_t patch_h, int64_t patch_w, bool need_x,
    bool need_qkv, bool need_out);

Tensor separable_layer(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& query_weight, const Tensor& query_bias,
    const Tensor& key_weight, const Tensor& key_bias, const Tensor& value_weight, const Tensor& value_bias, const Tensor& out_weight, const Tensor& out_bias,
    double eps, int64_t patch_h, int64_t patch_w);

}  // namespace vitkernels
