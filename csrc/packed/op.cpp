// The packed op's entry points: tensors to plain structs, outputs allocated, units planned, the kernel table of this CPU called.
#include "packed/op.h"

#include <algorithm>

#include "common/lengths.h"
#include "common/parallel.h"
#include "common/stable.h"
#include "packed/entry.h"

namespace vitkernels {
namespace {

constexpr const char* kOp = "varlen_attention";

Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Everything that must outlive the kernel beside the tensors it was given.
struct Prepared {
  OptionalTensor bias, q_weight, q_bias, k_weight, k_bias;
  packed::Schedule schedule;
};

struct Options {
  const OptionalTensor &seqused_k, &bias, &q_weight, &q_bias, &k_weight, &k_bias;
  int64_t qk_norm;
  double norm_eps, scale, dropout_p;
  const OptionalTensor& seed;
};

void check_accumulation(const Tensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == accumulation_type(q), "vitkernels::varlen_attention: ", name, " must be float32 (float64 for float64)");
}

OptionalTensor norm_weight(const OptionalTensor& weight, const Tensor& q, int64_t heads, int64_t dim) {
  if (!weight) return weight;
  check_accumulation(*weight, q, "a norm's weight");
  STD_TORCH_CHECK(
      weight->dim() == 2 && weight->size(0) == heads && weight->size(1) == dim, "vitkernels::varlen_attention: a norm's weight must be [heads, dim]");
  return dense(weight);
}

void fill(packed::Attention& a, Prepared& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, const Options& o) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "vitkernels::varlen_attention: q, k and v must be 3-dimensional");
  check_same(k, q, "k");
  check_same(v, q, "v");
  STD_TORCH_CHECK(
      k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == k.size(1) && k.size(1) > 0 && q.size(1) % k.size(1) == 0 && q.size(2) > 0 && v.size(2) > 0,
      "vitkernels::varlen_attention: q must be [T_q, H, D], k [T_k, H_k, D] and v [T_k, H_k, D_v] with H_k a divisor of H");
  a.dtype = dtype_of(q);
  a.places = {true, 1, 1, 0};
  a.sequences = cu_q.size(0) - 1;
  STD_TORCH_CHECK(a.sequences >= 0, "vitkernels::varlen_attention: cu_seqlens_q must have at least one element");
  a.total_q = q.size(0), a.total_k = k.size(0), a.heads = q.size(1), a.kv_heads = k.size(1), a.dim = q.size(2), a.value_dim = v.size(2);
  a.cu_q = int32_values(cu_q, a.sequences + 1, kOp, "cu_seqlens_q");
  a.cu_k = int32_values(cu_k, a.sequences + 1, kOp, "cu_seqlens_k");
  a.used_k = o.seqused_k ? int32_values(*o.seqused_k, a.sequences, kOp, "seqused_k") : nullptr;
  check_cumulative(a.cu_q, a.sequences, a.total_q, kOp, "cu_seqlens_q");
  check_cumulative(a.cu_k, a.sequences, a.total_k, kOp, "cu_seqlens_k");
  check_used(a.used_k, a.cu_k, a.sequences, kOp, "seqused_k");
  a.q = rows_of(q), a.k = rows_of(k), a.v = rows_of(v);
  if (o.bias) {
    int64_t longest_q = 0, longest_k = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
      longest_q = std::max<int64_t>(longest_q, a.cu_q[s + 1] - a.cu_q[s]);
      longest_k = std::max<int64_t>(longest_k, a.cu_k[s + 1] - a.cu_k[s]);
    }
    check_accumulation(*o.bias, q, "bias");
    STD_TORCH_CHECK(
        o.bias->dim() == 3 && o.bias->size(0) == a.heads && o.bias->size(1) >= longest_q && o.bias->size(2) >= longest_k,
        "vitkernels::varlen_attention: bias must be [heads, longest q, longest k] at least");
    p.bias = o.bias->stride(2) == 1 ? o.bias : dense(o.bias);
    a.bias = p.bias->data_ptr();
    a.bias_head_stride = p.bias->stride(0), a.bias_row_stride = p.bias->stride(1), a.bias_column_stride = 1;
  }
  STD_TORCH_CHECK(o.qk_norm >= 0 && o.qk_norm <= 3, "vitkernels::varlen_attention: qk_norm must be 0 to 3");
  a.norm = static_cast<packed::Norm>(o.qk_norm);
  a.norm_eps = o.norm_eps;
  p.q_weight = norm_weight(o.q_weight, q, a.heads, a.dim), p.q_bias = norm_weight(o.q_bias, q, a.heads, a.dim);
  p.k_weight = norm_weight(o.k_weight, q, a.kv_heads, a.dim), p.k_bias = norm_weight(o.k_bias, q, a.kv_heads, a.dim);
  a.q_norm = {data_of(p.q_weight), data_of(p.q_bias)}, a.k_norm = {data_of(p.k_weight), data_of(p.k_bias)};
  a.scale = o.scale;
  packed::set_dropout(a, o.dropout_p, o.seed, kOp);
  a.schedule = &p.schedule;
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k,
    const OptionalTensor&, const OptionalTensor& bias, const OptionalTensor& q_norm_weight, const OptionalTensor& q_norm_bias,
    const OptionalTensor& k_norm_weight, const OptionalTensor& k_norm_bias, int64_t qk_norm, double norm_eps, double scale, double dropout_p,
    const OptionalTensor& seed) {
  Tensor lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Double);
  packed::Forward a{};
  Prepared p;
  fill(a, p, q, k, v, cu_seqlens_q, cu_seqlens_k,
       {seqused_k, bias, q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, qk_norm, norm_eps, scale, dropout_p, seed});
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  a.out = rows_of(out), a.lse = lse.data_ptr();
  p.schedule = packed::make_schedule(a.cu_q, a.cu_k, a.used_k, a.sequences, a.kv_heads, num_threads(), true);
  packed::kernels().forward(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor&, const OptionalTensor& bias,
    const OptionalTensor& q_norm_weight, const OptionalTensor& q_norm_bias, const OptionalTensor& k_norm_weight, const OptionalTensor& k_norm_bias,
    int64_t qk_norm, double norm_eps, double scale, double dropout_p, const OptionalTensor& seed, bool need_q, bool need_k, bool need_v, bool need_bias,
    bool need_norm) {
  packed::Backward a{};
  Prepared p;
  fill(a, p, q, k, v, cu_seqlens_q, cu_seqlens_k,
       {seqused_k, bias, q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, qk_norm, norm_eps, scale, dropout_p, seed});
  STD_TORCH_CHECK(
      out.numel() == a.total_q * a.heads * a.value_dim && lse.numel() == a.heads * a.total_q && lse.scalar_type() == ScalarType::Double,
      "vitkernels::varlen_attention_backward: out and lse must be the forward's");
  check_same(out, q, "out");
  const Tensor saved_lse = dense(lse);
  const OptionalTensor dense_grad_lse = dense(grad_lse);
  if (grad_out) {
    check_same(*grad_out, q, "grad_out");
    STD_TORCH_CHECK(
        grad_out->dim() == 3 && grad_out->size(0) == a.total_q && grad_out->size(1) == a.heads && grad_out->size(2) == a.value_dim,
        "vitkernels::varlen_attention_backward: grad_out must have the shape of out");
    a.grad_out = rows_of(*grad_out);
  }
  if (grad_lse) {
    check_same(*grad_lse, lse, "grad_lse");
    STD_TORCH_CHECK(grad_lse->numel() == lse.numel(), "vitkernels::varlen_attention_backward: grad_lse must have the shape of lse");
  }
  const auto grad = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(lse, {0});
  };
  const auto norm_grad = [&](const OptionalTensor& weight) {
    return need_norm && weight ? torch::stable::new_empty(*weight, weight->sizes()) : torch::stable::new_empty(lse, {0});
  };
  const auto pointer = [](const Tensor& tensor, bool needed) { return needed ? tensor.data_ptr() : nullptr; };
  Tensor grad_q = grad(need_q, q), grad_k = grad(need_k, k), grad_v = grad(need_v, v);
  Tensor grad_bias = need_bias && bias ? torch::stable::new_zeros(*bias, bias->sizes()) : torch::stable::new_empty(lse, {0});
  Tensor grad_q_weight = norm_grad(q_norm_weight), grad_q_bias = norm_grad(q_norm_bias);
  Tensor grad_k_weight = norm_grad(k_norm_weight), grad_k_bias = norm_grad(k_norm_bias);
  a.grad_lse = data_of(dense_grad_lse);
  a.lse = saved_lse.data_ptr();
  if (need_q) a.grad_q = rows_of(grad_q);
  if (need_k) a.grad_k = rows_of(grad_k);
  if (need_v) a.grad_v = rows_of(grad_v);
  if (need_bias && bias) {
    a.grad_bias = grad_bias.data_ptr();
    a.grad_bias_head_stride = grad_bias.stride(0), a.grad_bias_row_stride = grad_bias.stride(1), a.grad_bias_column_stride = 1;
    a.grad_bias_sequences = std::max<int64_t>(a.sequences, 1);
  }
  a.grad_q_weight = pointer(grad_q_weight, need_norm && q_norm_weight), a.grad_q_bias = pointer(grad_q_bias, need_norm && q_norm_bias);
  a.grad_k_weight = pointer(grad_k_weight, need_norm && k_norm_weight), a.grad_k_bias = pointer(grad_k_bias, need_norm && k_norm_bias);
  p.schedule = packed::make_schedule(a.cu_q, a.cu_k, a.used_k, a.sequences, a.kv_heads, num_threads(), false);
  if (a.grad_bias) p.schedule = packed::by_part(std::move(p.schedule), a.grad_bias_sequences, true);
  packed::kernels().backward(a);
  return {grad_q, grad_k, grad_v, grad_bias, grad_q_weight, grad_q_bias, grad_k_weight, grad_k_bias};
}

}  // namespace vitkernels
