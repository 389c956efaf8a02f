// The projection of an image's patches as PyTorch calls it. The schema is in vitkernels/ops/patch_embedding/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace vitkernels {

using torch::stable::Tensor;

Tensor patch_embedding(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& weight, const Tensor& bias,
    int64_t out_channels, int64_t patch_height, int64_t patch_width, bool norm, double eps);

}  // namespace vitkernels
