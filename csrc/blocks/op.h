// Transformer blocks as PyTorch calls them. The schema, and what the program means, are in vitkernels/ops/blocks/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace vitkernels {

using torch::stable::Tensor;

Tensor transformer_blocks(
    const Tensor& x, const Tensor& matrices, const Tensor& vectors, const Tensor& numbers, std::vector<int64_t> program, int64_t patch_height, int64_t patch_width,
    int64_t first, const std::optional<Tensor>& memory_k, const std::optional<Tensor>& memory_v, std::vector<int64_t> groups);

}  // namespace vitkernels
