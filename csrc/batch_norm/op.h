// The batch norm as PyTorch calls it. The schema, and every check with a full message, are in vitkernels/ops/batch_norm/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, int64_t activation);

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps, int64_t activation,
    bool need_x);

}  // namespace vitkernels
