// The cascaded-group ops as PyTorch calls them. Schemas, and every check with a full message, are in vitkernels/ops/cascaded_group/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace vitkernels {

using torch::stable::Tensor;

Tensor cascaded_group_attention(
    const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
    const Tensor& attention_bias, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias, std::vector<int64_t> kernel_sizes, int64_t key_dim,
    double scale, int64_t window);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight,
    const std::optional<Tensor>& dw_bias, const Tensor& attention_bias, const Tensor& proj_weight, std::vector<int64_t> kernel_sizes, int64_t key_dim,
    double scale, int64_t window, bool need_x, bool need_weights);

// Gammas, betas, mean, var, projected and moments are in the accumulation type.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_batch_norm(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& qkv_gamma, const Tensor& qkv_beta, const Tensor& dw_weight, const Tensor& dw_gamma,
    const Tensor& dw_beta, const Tensor& attention_bias, const Tensor& proj_weight, const Tensor& proj_gamma, const Tensor& proj_beta,
    std::vector<int64_t> kernel_sizes, int64_t key_dim, double scale, int64_t window, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_batch_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const Tensor& qkv_gamma, const Tensor& qkv_beta, const Tensor& dw_weight,
    const Tensor& dw_gamma, const Tensor& dw_beta, const Tensor& attention_bias, const Tensor& proj_weight, const Tensor& proj_gamma, const Tensor& mean,
    const Tensor& var, const Tensor& projected, const Tensor& moments, std::vector<int64_t> kernel_sizes, int64_t key_dim, double scale, int64_t window,
    double eps, bool need_x, bool need_weights);

}  // namespace vitkernels
