// The chain of layers as PyTorch calls it. Its schema, and what its program means, are in vitkernels/ops/chain/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace vitkernels {

using torch::stable::Tensor;

Tensor layer_chain(const Tensor& x, const Tensor& matrices, const Tensor& vectors, std::vector<int64_t> program);

}  // namespace vitkernels
