// Re-Attention as PyTorch calls it. The schema, and every check with a full message, is in vitkernels/ops/head_mixing/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "head_mixing/kernels.h"

namespace vitkernels {

using torch::stable::Tensor;

namespace head_mixing {

// The table of this CPU.
const Kernels& kernels();

}  // namespace head_mixing

std::tuple<Tensor, Tensor, Tensor, Tensor> re_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mix_weight, const std::optional<Tensor>& mix_bias, int64_t norm,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
    bool live, double eps, double scale, double dropout_p, const std::optional<Tensor>& seed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> re_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Tensor& mix_weight, const std::optional<Tensor>& mix_bias,
    int64_t norm, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var, bool live, double eps, double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_q, bool need_k,
    bool need_v);

}  // namespace vitkernels
