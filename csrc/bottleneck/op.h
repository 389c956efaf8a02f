#pragma once

#include <optional>

#include "bottleneck/kernels.h"
#include "common/stable.h"

namespace vitkernels {

namespace bottleneck {

// The table of this CPU.
const Kernels& kernels();

// The data of panels [panels][depth][kPanel] of `weights` for so many output channels, which come with their bias of `type`.
const void* checked_panels(const Tensor& weight, const Tensor& bias, int64_t depth, int64_t channels, ScalarType weights, ScalarType type, const char* name);

// Whether the weights of an op on `x` are pairs (Bottleneck::pairs): `weight` tells, by its dtype.
bool pairs_of(const Tensor& x, const Tensor& weight, int64_t in, int64_t hidden);

// The data of a norm's weight or bias, if it has one.
const void* checked_norm(const std::optional<Tensor>& tensor, int64_t channels, ScalarType type);

}  // namespace bottleneck

Tensor inverted_bottleneck(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const std::optional<Tensor>& depthwise_weight, const std::optional<Tensor>& depthwise_bias,
    const Tensor& project_weight, const Tensor& project_bias, const std::optional<Tensor>& residual, int64_t out_channels, int64_t norm, double eps, int64_t kernel,
    int64_t stride, int64_t padding, int64_t activation, int64_t out_activation);

}  // namespace vitkernels
