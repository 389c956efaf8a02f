// The memory op's entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "memory/op.h"

#include <algorithm>
#include <cmath>

#include "common/stable.h"
#include "dense/op.h"

namespace vitkernels {

const memory::Kernels& memory::kernels() {
  static const Kernels& table = []() -> const Kernels& { VITKERNELS_SELECT_KERNELS(memory_kernels) }();
  return table;
}

namespace {

Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// `begin` outlives the kernel: where each group's memory begins. No groups: all of the memory is everyone's.
void fill(
    memory::Attention& a, std::vector<int64_t>& begin, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& memory_k, const Tensor& memory_v,
    const std::optional<Tensor>& own_k, const std::optional<Tensor>& own_v, const std::vector<int64_t>& groups, double scale, double dropout_p,
    const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && memory_k.dim() == 3 && memory_v.dim() == 3,
      "vitkernels::memory_attention: q, k and v must be 4-dimensional, memory_k and memory_v 3-dimensional");
  const std::pair<const Tensor*, const char*> others[] = {{&k, "k"}, {&v, "v"}, {&memory_k, "memory_k"}, {&memory_v, "memory_v"}};
  for (const auto& [tensor, name] : others) check_same(*tensor, q, name);
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.keys = k.size(2), a.dim = q.size(3), a.value_dim = v.size(3);
  const auto agrees = [&](const Tensor& t, int64_t rows, int64_t dim) { return t.size(0) == a.batch && t.size(1) == a.heads && t.size(2) == rows && t.size(3) == dim; };
  const int64_t memories = memory_k.size(0);
  STD_TORCH_CHECK(
      a.dim > 0 && a.value_dim > 0 && agrees(k, a.keys, a.dim) && agrees(v, a.keys, a.value_dim) && memory_k.size(1) == a.heads && memory_k.size(2) == a.dim &&
          memory_v.size(0) == memories && memory_v.size(1) == a.heads && memory_v.size(2) == a.value_dim,
      "vitkernels::memory_attention: q must be [B, H, N, D], k [B, H, K, D], v [B, H, K, D_v], memory_k [M, H, D] and memory_v [M, H, D_v]");
  a.q = map_of(q), a.k = map_of(k), a.v = map_of(v), a.memory_k = rows_of(memory_k), a.memory_v = rows_of(memory_v);
  STD_TORCH_CHECK(own_k.has_value() == own_v.has_value(), "vitkernels::memory_attention: own_k and own_v must both be given, or neither");
  if (own_k) {
    check_same(*own_k, q, "own_k");
    check_same(*own_v, q, "own_v");
    STD_TORCH_CHECK(
        own_k->dim() == 4 && own_v->dim() == 4 && agrees(*own_k, a.queries, a.dim) && agrees(*own_v, a.queries, a.value_dim),
        "vitkernels::memory_attention: own_k must be [B, H, N, D] and own_v [B, H, N, D_v]");
    a.own_k = map_of(*own_k), a.own_v = map_of(*own_v);
  }
  begin.push_back(0);
  for (const int64_t length : groups) {
    STD_TORCH_CHECK(length >= 0, "vitkernels::memory_attention: a group's memory cannot be negative");
    begin.push_back(begin.back() + length);
  }
  if (groups.empty()) begin.push_back(memories);
  a.groups = static_cast<int64_t>(begin.size()) - 1;
  STD_TORCH_CHECK(begin.back() == memories && a.queries % a.groups == 0, "vitkernels::memory_attention: the groups must add up to M, and their number divide N");
  a.memory_begin = begin.data();
  a.scale = scale;
  a.dropout = dropout_p > 0;
  if (a.dropout) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "vitkernels::memory_attention: seed must be one int64");
    a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    a.drop_limit = static_cast<uint32_t>(std::clamp(std::nearbyint(dropout_p * 0x1p32), 1.0, 0x1p32) - 1.0);
    a.keep_factor = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  }
}

// One memory that every query sees, and nothing of its own: shared keys of plain attention.
bool is_plain(const std::vector<int64_t>& groups, const std::optional<Tensor>& own_k) { return groups.empty() && !own_k; }

}  // namespace

std::tuple<Tensor, Tensor> memory_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& memory_k, const Tensor& memory_v, const std::optional<Tensor>& own_k,
    const std::optional<Tensor>& own_v, std::vector<int64_t> groups, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  if (is_plain(groups, own_k)) {
    const auto [out, lse] = attention(q, k, v, std::nullopt, std::nullopt, memory_k, memory_v, scale, dropout_p, seed);
    return {torch::stable::transpose(out, 1, 2), lse};
  }
  memory::Forward a{};
  std::vector<int64_t> begin;
  fill(a, begin, q, k, v, memory_k, memory_v, own_k, own_v, groups, scale, dropout_p, seed);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.queries, a.heads, a.value_dim});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.queries}, ScalarType::Double);
  a.out = out.data_ptr(), a.lse = static_cast<double*>(lse.data_ptr());
  memory::kernels().forward(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_attention_backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& memory_k,
    const Tensor& memory_v, const std::optional<Tensor>& own_k, const std::optional<Tensor>& own_v, const Tensor& lse, std::vector<int64_t> groups,
    double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_q, bool need_k, bool need_v, bool need_memory_k, bool need_memory_v,
    bool need_own_k, bool need_own_v) {
  if (is_plain(groups, own_k)) {
    const std::optional<Tensor> grad = grad_out ? std::optional<Tensor>(torch::stable::transpose(*grad_out, 1, 2)) : std::nullopt;
    const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});  // only its size is looked at
    const auto [grad_q, grad_k, grad_v, none, grad_memory_k, grad_memory_v] = attention_backward(
        grad, grad_lse, q, k, v, out, lse, std::nullopt, std::nullopt, memory_k, memory_v, scale, dropout_p, seed, need_q, need_k, need_v, false, need_memory_k, need_memory_v);
    return {grad_q, grad_k, grad_v, grad_memory_k, grad_memory_v, none, torch::stable::new_empty(lse, {0})};
  }
  memory::Backward a{};
  std::vector<int64_t> begin;
  fill(a, begin, q, k, v, memory_k, memory_v, own_k, own_v, groups, scale, dropout_p, seed);
  const Tensor saved_lse = dense(lse);
  const std::optional<Tensor> dense_grad_lse = dense(grad_lse);
  const int64_t rows = a.batch * a.heads * a.queries;
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Double && lse.numel() == rows, "vitkernels::memory_attention_backward: lse must be the forward's");
  if (grad_out) {
    check_same(*grad_out, q, "grad_out");
    STD_TORCH_CHECK(
        grad_out->dim() == 4 && grad_out->size(0) == a.batch && grad_out->size(1) == a.queries && grad_out->size(2) == a.heads && grad_out->size(3) == a.value_dim,
        "vitkernels::memory_attention_backward: grad_out must be [B, N, H, D_v]");
    a.grad_out = {grad_out->data_ptr(), grad_out->stride(0), grad_out->stride(2), grad_out->stride(1), grad_out->stride(3)};
  }
  if (grad_lse) {
    check_same(*grad_lse, lse, "grad_lse");
    STD_TORCH_CHECK(grad_lse->numel() == rows, "vitkernels::memory_attention_backward: grad_lse must have the shape of lse");
  }
  a.grad_lse = static_cast<const double*>(data_of(dense_grad_lse));
  a.lse = static_cast<const double*>(saved_lse.data_ptr());
  const auto grad = [&](bool needed, const Tensor& like, void*& data) {
    Tensor result = needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(lse, {0});
    data = needed ? result.data_ptr() : nullptr;
    return result;
  };
  Tensor grad_q = grad(need_q, q, a.grad_q), grad_k = grad(need_k, k, a.grad_k), grad_v = grad(need_v, v, a.grad_v);
  Tensor grad_memory_k = grad(need_memory_k, memory_k, a.grad_memory_k), grad_memory_v = grad(need_memory_v, memory_v, a.grad_memory_v);
  Tensor grad_own_k = grad(need_own_k && own_k, own_k ? *own_k : q, a.grad_own_k), grad_own_v = grad(need_own_v && own_v, own_v ? *own_v : q, a.grad_own_v);
  memory::kernels().backward(a);
  return {grad_q, grad_k, grad_v, grad_memory_k, grad_memory_v, grad_own_k, grad_own_v};
}

}  // namespace vitkernels
