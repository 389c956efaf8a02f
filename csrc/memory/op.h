// Attention with memory as PyTorch calls it. The schema, and every check with a full message, is in vitkernels/ops/memory/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "memory/kernels.h"

namespace vitkernels {

namespace memory {
const Kernels& kernels();
}

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> memory_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& memory_k, const Tensor& memory_v, const std::optional<Tensor>& own_k,
    const std::optional<Tensor>& own_v, std::vector<int64_t> groups, double scale, double dropout_p, const std::optional<Tensor>& seed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_attention_backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& memory_k,
    const Tensor& memory_v, const std::optional<Tensor>& own_k, const std::optional<Tensor>& own_v, const Tensor& lse, std::vector<int64_t> groups,
    double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_q, bool need_k, bool need_v, bool need_memory_k, bool need_memory_v,
    bool need_own_k, bool need_own_v);

}  // namespace vitkernels
