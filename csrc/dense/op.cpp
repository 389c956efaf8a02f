// Entry points of attention of a batch: an image is a sequence of the packed kernels, found by the batch stride.
#include "dense/op.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "packed/entry.h"

namespace vitkernels {
namespace {

constexpr const char* kOp = "attention";
// Parts that a bias's gradient is summed in, at least, where images share it: what threads can work on beside each other. Always as many, so that results do not
// depend on the number of threads.
constexpr int64_t kBiasParts = 8;

// [B, H, N, D] of any strides.
Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(2), t.stride(1), t.stride(3), t.stride(0)}; }

Tensor row_numbers(const Tensor& q) {
  const int64_t heads = q.size(1), tokens = q.size(2);
  return empty_strided({q.size(0), heads, tokens}, {std::max<int64_t>(heads, 1) * std::max<int64_t>(tokens, 1), std::max<int64_t>(tokens, 1), 1}, ScalarType::Double);
}

// Everything that must outlive the kernel beside the tensors it was given.
struct Prepared {
  std::vector<int32_t> cu_q, cu_k, used_k;
  OptionalTensor bias, key_padding, shared_k, shared_v;
  packed::Schedule schedule;
};

struct Options {
  const OptionalTensor &bias, &key_padding, &shared_k, &shared_v;
  double scale, dropout_p;
  const OptionalTensor& seed;
};

void set_bias(packed::Attention& a, Prepared& p, const Tensor& bias, const Tensor& q, int64_t keys) {
  STD_TORCH_CHECK(bias.scalar_type() == accumulation_type(q), "vitkernels::attention: bias must be float32 (float64 for float64)");
  const int64_t whole[] = {q.size(0), q.size(1), q.size(2), keys};
  STD_TORCH_CHECK(bias.dim() == 4, "vitkernels::attention: bias must be 4-dimensional");
  for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(bias.size(d) == 1 || bias.size(d) == whole[d], "vitkernels::attention: bias must broadcast to [B, H, N, M]");
  p.bias = bias.size(3) == 1 || bias.stride(3) == 1 ? bias : dense(bias);
  const auto stride = [&](int64_t d) { return p.bias->size(d) == 1 ? 0 : p.bias->stride(d); };
  a.bias = p.bias->data_ptr();
  a.bias_sequence_stride = stride(0), a.bias_head_stride = stride(1), a.bias_row_stride = stride(2), a.bias_column_stride = stride(3);
}

// Keys behind the last one that is none of padding are never computed; those between are hidden.
void set_padding(packed::Attention& a, Prepared& p, const Tensor& key_padding, int64_t batch, int64_t keys) {
  STD_TORCH_CHECK(
      key_padding.scalar_type() == ScalarType::Bool && key_padding.dim() == 2 && key_padding.size(0) == batch && key_padding.size(1) == keys,
      "vitkernels::attention: key_padding must be bool [B, M]");
  p.key_padding = dense(key_padding);
  a.key_padding = static_cast<const uint8_t*>(p.key_padding->data_ptr());
  if (a.shared) return;
  p.used_k.resize(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    int64_t used = keys;
    while (used > 0 && !a.key_padding[b * keys + used - 1]) --used;
    p.used_k[b] = static_cast<int32_t>(used);
  }
  a.used_k = p.used_k.data();
}

void fill(packed::Attention& a, Prepared& p, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o, bool split) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "vitkernels::attention: q, k and v must be 4-dimensional");
  check_same(k, q, "k");
  check_same(v, q, "v");
  const int64_t batch = q.size(0), keys = k.size(2);
  STD_TORCH_CHECK(
      k.size(0) == batch && k.size(3) == q.size(3) && v.size(0) == batch && v.size(1) == k.size(1) && v.size(2) == keys && k.size(1) > 0 &&
          q.size(1) % k.size(1) == 0 && q.size(1) > 0 && q.size(3) > 0 && v.size(3) > 0,
      "vitkernels::attention: q must be [B, H, N, D], k [B, H_k, M, D] and v [B, H_k, M, D_v] with H_k a divisor of H");
  a.dtype = dtype_of(q);
  a.places = {false, 1, 1, 0};
  a.sequences = batch, a.heads = q.size(1), a.kv_heads = k.size(1), a.dim = q.size(3), a.value_dim = v.size(3);
  a.total_q = batch * q.size(2), a.total_k = batch * keys;
  p.cu_q = packed::even_lengths(batch, q.size(2)), p.cu_k = packed::even_lengths(batch, keys);
  a.cu_q = p.cu_q.data(), a.cu_k = p.cu_k.data();
  a.q = rows_of(q), a.k = rows_of(k), a.v = rows_of(v);
  if (o.shared_k || o.shared_v) {
    const auto agrees = [&](const OptionalTensor& t, int64_t width) { return t && t->dim() == 3 && t->size(1) == a.kv_heads && t->size(2) == width; };
    STD_TORCH_CHECK(
        agrees(o.shared_k, a.dim) && agrees(o.shared_v, a.value_dim) && o.shared_k->size(0) == o.shared_v->size(0),
        "vitkernels::attention: shared_k must be [m, H_k, D] and shared_v [m, H_k, D_v]");
    check_same(*o.shared_k, q, "shared_k");
    check_same(*o.shared_v, q, "shared_v");
    p.shared_k = dense(o.shared_k), p.shared_v = dense(o.shared_v);
    a.shared = p.shared_k->size(0);
    a.shared_k = data_of(p.shared_k), a.shared_v = data_of(p.shared_v);
  }
  if (o.bias) set_bias(a, p, *o.bias, q, keys + a.shared);
  if (o.key_padding) set_padding(a, p, *o.key_padding, batch, keys);
  a.scale = o.scale;
  packed::set_dropout(a, o.dropout_p, o.seed, kOp);
  p.schedule = packed::make_schedule(a.cu_q, a.cu_k, a.used_k, a.sequences, a.kv_heads, num_threads(), split);
  a.schedule = &p.schedule;
}

// Where the kernel adds up the bias's gradient, [parts, H or 1, N or 1, M or 1]: the gradient itself, or parts of it, some images each.
Tensor bias_parts(packed::Backward& a, Prepared& p, const Tensor& bias, Tensor& grad) {
  const bool of_heads = bias.size(1) > 1;
  int64_t parts = bias.size(0);
  a.grad_bias_sequences = 1;
  if (parts == 1) {
    const int64_t wanted = std::clamp<int64_t>(kBiasParts / (of_heads ? a.kv_heads : 1), 1, std::max<int64_t>(a.sequences, 1));
    a.grad_bias_sequences = std::max<int64_t>((a.sequences + wanted - 1) / wanted, 1);
    parts = std::max<int64_t>((a.sequences + a.grad_bias_sequences - 1) / a.grad_bias_sequences, 1);
  }
  Tensor sums = parts == bias.size(0) ? grad : torch::stable::new_zeros(bias, {parts, bias.size(1), bias.size(2), bias.size(3)});
  const auto stride = [&](int64_t d) { return bias.size(d) == 1 ? 0 : sums.stride(d); };
  a.grad_bias = sums.data_ptr();
  a.grad_bias_sequence_stride = parts == 1 ? 0 : sums.stride(0);
  a.grad_bias_head_stride = stride(1), a.grad_bias_row_stride = stride(2), a.grad_bias_column_stride = stride(3);
  p.schedule = packed::by_part(std::move(p.schedule), a.grad_bias_sequences, of_heads);
  return sums;
}

template <class T>
void add_parts(const Tensor& parts, Tensor& out) {
  T* to = static_cast<T*>(out.data_ptr());
  const T* from = static_cast<const T*>(parts.data_ptr());
  for (int64_t i = 0; i < parts.size(0); ++i) {
    for (int64_t c = 0; c < out.numel(); ++c) to[c] += from[i * out.numel() + c];
  }
}

}  // namespace

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias, const OptionalTensor& key_padding, const OptionalTensor& shared_k,
    const OptionalTensor& shared_v, double scale, double dropout_p, const OptionalTensor& seed) {
  packed::Forward a{};
  Prepared p;
  fill(a, p, q, k, v, {bias, key_padding, shared_k, shared_v, scale, dropout_p, seed}, true);
  Tensor out = token_major(q, a.value_dim), lse = row_numbers(q);
  a.out = rows_of(out), a.lse = lse.data_ptr();
  packed::kernels().forward(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const OptionalTensor& bias, const OptionalTensor& key_padding, const OptionalTensor& shared_k, const OptionalTensor& shared_v, double scale, double dropout_p,
    const OptionalTensor& seed, bool need_q, bool need_k, bool need_v, bool need_bias, bool need_shared_k, bool need_shared_v) {
  packed::Backward a{};
  Prepared p;
  fill(a, p, q, k, v, {bias, key_padding, shared_k, shared_v, scale, dropout_p, seed}, false);
  STD_TORCH_CHECK(
      out.numel() == a.total_q * a.heads * a.value_dim && lse.numel() == a.heads * a.total_q && lse.scalar_type() == ScalarType::Double,
      "vitkernels::attention_backward: out and lse must be the forward's");
  const Tensor saved_lse = dense(lse);
  const OptionalTensor dense_grad_lse = dense(grad_lse);
  if (grad_out) {
    check_same(*grad_out, q, "grad_out");
    STD_TORCH_CHECK(
        grad_out->dim() == 4 && grad_out->size(0) == q.size(0) && grad_out->size(1) == a.heads && grad_out->size(2) == q.size(2) &&
            grad_out->size(3) == a.value_dim,
        "vitkernels::attention_backward: grad_out must have the shape of out");
    a.grad_out = rows_of(*grad_out);
  }
  if (grad_lse) {
    check_same(*grad_lse, lse, "grad_lse");
    STD_TORCH_CHECK(grad_lse->numel() == lse.numel(), "vitkernels::attention_backward: grad_lse must have the shape of lse");
  }
  const auto nothing = [&] { return torch::stable::new_empty(lse, {0}); };
  const auto grad = [&](bool needed, const Tensor& like, Rows& rows) {
    if (!needed) return nothing();
    Tensor made = token_major(like, like.size(3));
    rows = rows_of(made);
    return made;
  };
  const auto shared_grad = [&](bool needed, const OptionalTensor& like, void*& data) {
    if (!needed || !like) return nothing();
    Tensor made = torch::stable::new_empty(*like, like->sizes());
    data = made.data_ptr();
    return made;
  };
  Tensor grad_q = grad(need_q, q, a.grad_q), grad_k = grad(need_k, k, a.grad_k), grad_v = grad(need_v, v, a.grad_v);
  Tensor grad_shared_k = shared_grad(need_shared_k, shared_k, a.grad_shared_k), grad_shared_v = shared_grad(need_shared_v, shared_v, a.grad_shared_v);
  a.grad_lse = data_of(dense_grad_lse), a.lse = saved_lse.data_ptr();
  if (!need_bias || !bias) {
    packed::kernels().backward(a);
    return {grad_q, grad_k, grad_v, nothing(), grad_shared_k, grad_shared_v};
  }
  Tensor grad_bias = torch::stable::new_zeros(*bias, bias->sizes());
  const Tensor parts = bias_parts(a, p, *bias, grad_bias);
  packed::kernels().backward(a);
  if (parts.data_ptr() != grad_bias.data_ptr()) a.dtype == Dtype::kFloat64 ? add_parts<double>(parts, grad_bias) : add_parts<float>(parts, grad_bias);
  return {grad_q, grad_k, grad_v, grad_bias, grad_shared_k, grad_shared_v};
}

}  // namespace vitkernels
