// The matching ops as PyTorch calls them. The schemas, and every check with a full message, are in vitkernels/ops/matching/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace vitkernels {

using torch::stable::Tensor;

Tensor pairwise_box_cost(
    const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes, const Tensor& cu_targets,
    std::vector<double> weights, bool focal, double alpha, double gamma);

std::tuple<Tensor, Tensor> detection_set_loss(
    const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes, const Tensor& matches,
    const Tensor& num_boxes, double eos_coef, bool focal, double alpha, double gamma);

std::tuple<Tensor, Tensor> detection_set_loss_backward(
    const Tensor& grad_losses, const Tensor& logits, const Tensor& boxes, const Tensor& target_labels, const Tensor& target_boxes,
    const Tensor& matches, const Tensor& num_boxes, const Tensor& divisors, double eos_coef, bool focal, double alpha, double gamma);

}  // namespace vitkernels
