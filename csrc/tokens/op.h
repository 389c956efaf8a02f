// The token ops as PyTorch calls them. The schemas, and every check with a full message, are in vitkernels/ops/tokens/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace vitkernels {

using torch::stable::Tensor;

Tensor factorized_position_embedding(
    const Tensor& x, const Tensor& height_table, const Tensor& width_table, const Tensor& rows, const Tensor& columns);

std::tuple<Tensor, Tensor> factorized_position_embedding_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& columns, int64_t height, int64_t width, bool need_height, bool need_width);

std::tuple<Tensor, Tensor> masked_pool(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused, bool largest);

Tensor masked_pool_backward(
    const Tensor& grad_out, const Tensor& indices, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused, int64_t rows, bool largest);

}  // namespace vitkernels
