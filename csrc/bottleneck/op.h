#pragma once

#include <optional>

#include "common/stable.h"

namespace vitkernels {

Tensor inverted_bottleneck(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const std::optional<Tensor>& depthwise_weight, const std::optional<Tensor>& depthwise_bias,
    const Tensor& project_weight, const Tensor& project_bias, const std::optional<Tensor>& residual, int64_t out_channels, int64_t norm, double eps, int64_t kernel,
    int64_t stride, int64_t padding, int64_t activation, int64_t out_activation);

}  // namespace vitkernels
