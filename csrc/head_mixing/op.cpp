// Re-Attention's entry points: tensors to plain structs, the small matrices folded, outputs allocated, the kernel table of this CPU called.
#include "head_mixing/op.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/stable.h"
#include "head_mixing/kernels.h"

namespace vitkernels {

const head_mixing::Kernels& head_mixing::kernels() {
  static const Kernels& table = []() -> const Kernels& { VITKERNELS_SELECT_KERNELS(head_mixing_kernels) }();
  return table;
}

namespace {

using head_mixing::kernels;

// A small float64 vector (converted in Python), or `otherwise` in every place.
std::vector<double> values_of(const std::optional<Tensor>& tensor, int64_t count, double otherwise) {
  if (!tensor) return std::vector<double>(static_cast<size_t>(count), otherwise);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Double && tensor->numel() == count, "vitkernels::re_attention: a weight must be float64 of ", count, " elements");
  const Tensor contiguous = dense(*tensor);
  const double* data = static_cast<const double*>(contiguous.data_ptr());
  return std::vector<double>(data, data + count);
}

struct Weights {
  std::vector<double> mix, bias, gamma, beta, mean, std, constant;
};

void fill(head_mixing::Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, int64_t norm, double eps, double scale, double dropout_p,
          const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "vitkernels::re_attention: q, k and v must be 4-dimensional");
  check_same(k, q, "k");
  check_same(v, q, "v");
  const auto agrees = [&](const Tensor& t, int64_t dim) { return t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.size(3) == dim; };
  STD_TORCH_CHECK(agrees(k, q.size(3)) && agrees(v, v.size(3)), "vitkernels::re_attention: q and k must be [B, H, N, D], v [B, H, N, D_v]");
  STD_TORCH_CHECK(q.size(1) <= 64, "vitkernels::re_attention: at most 64 heads");
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "vitkernels::re_attention: norm must be 0 to 2");
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.heads = q.size(1), a.queries = a.keys = q.size(2), a.dim = q.size(3), a.value_dim = v.size(3);
  a.q = map_of(q), a.k = map_of(k), a.v = map_of(v);
  a.norm = static_cast<head_mixing::Norm>(norm);
  a.eps = eps, a.scale = scale;
  a.dropout = dropout_p > 0;
  // With every element dropped the maps are zero, and exactly so.
  a.centre = a.norm == head_mixing::Norm::kBatch && a.queries > 0 && dropout_p < 1 ? 1.0 / static_cast<double>(a.queries) : 0;
  if (a.dropout) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "vitkernels::re_attention: seed must be one int64");
    a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    a.drop_limit = static_cast<uint32_t>(std::clamp(std::nearbyint(dropout_p * 0x1p32), 1.0, 0x1p32) - 1.0);
    a.keep_factor = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  }
}

// The mean of what is mixed from centred maps without the bias, given the mean of the mixed maps.
void centre_means(const head_mixing::Attention& a, Weights& w) {
  for (int64_t g = 0; g < a.heads; ++g) {
    w.mean[g] -= w.bias[g];
    for (int64_t h = 0; h < a.heads; ++h) w.mean[g] -= w.mix[g * a.heads + h] * a.centre;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> re_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mix_weight, const std::optional<Tensor>& mix_bias, int64_t norm,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
    bool live, double eps, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  using head_mixing::Norm;
  head_mixing::Forward a{};
  fill(a, q, k, v, norm, eps, scale, dropout_p, seed);
  const int64_t heads = a.heads;
  Weights w{values_of(mix_weight, heads * heads, 0), values_of(mix_bias, heads, 0), values_of(norm_weight, heads, 1), values_of(norm_bias, heads, 0),
            values_of(mean, heads, 0), values_of(var, heads, 1), {}};
  Tensor out = token_major(q, a.value_dim);
  Tensor lse = torch::stable::new_empty(q, {a.batch, heads, a.queries}, ScalarType::Double);
  Tensor batch_mean = torch::stable::new_empty(mix_weight, {live ? heads : 0}), batch_var = torch::stable::new_empty(mix_weight, {live ? heads : 0});
  a.lse = static_cast<double*>(lse.data_ptr()), a.out = out.data_ptr();
  a.mix = w.mix.data(), a.mix_bias = w.bias.data(), a.weight = w.gamma.data();
  w.constant = a.norm == Norm::kNone ? w.bias : w.beta;
  a.constant = w.constant.data();
  if (a.norm == Norm::kBatch) {
    std::vector<double>& var_of = w.std;
    if (live) {
      std::vector<double> sums(static_cast<size_t>(heads)), products(static_cast<size_t>(heads * heads));
      head_mixing::Moments m{};
      static_cast<head_mixing::Attention&>(m) = a;
      m.lse = a.lse, m.sums = sums.data(), m.products = products.data();
      kernels().moments(m);
      const double count = a.elements();
      for (int64_t g = 0; g < heads; ++g) {
        double centred_mean = 0, second = 0;
        w.mean[g] = w.bias[g];
        for (int64_t h = 0; h < heads; ++h) {
          const double c = w.mix[g * heads + h];
          // Rows of a softmax sum to 1: without dropout the centred sums are rounding, and exactly zero.
          centred_mean += a.dropout ? c * sums[h] / count : 0;
          w.mean[g] += c * a.centre;
          for (int64_t f = 0; f < heads; ++f) second += c * w.mix[g * heads + f] * products[h * heads + f] / count;
        }
        w.mean[g] += centred_mean;
        var_of[g] = std::max(second - centred_mean * centred_mean, 0.0);
        static_cast<double*>(batch_mean.data_ptr())[g] = w.mean[g];
        static_cast<double*>(batch_var.data_ptr())[g] = var_of[g];
      }
    }
    centre_means(a, w);
    for (int64_t g = 0; g < heads; ++g) {
      const double factor = w.gamma[g] / std::sqrt(var_of[g] + eps);
      for (int64_t h = 0; h < heads; ++h) w.mix[g * heads + h] *= factor;
      w.constant[g] = w.beta[g] - factor * w.mean[g];
    }
  }
  kernels().forward(a);
  return {out, lse, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> re_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Tensor& mix_weight, const std::optional<Tensor>& mix_bias,
    int64_t norm, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var, bool live, double eps, double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_q, bool need_k,
    bool need_v) {
  using head_mixing::Norm;
  head_mixing::Backward a{};
  fill(a, q, k, v, norm, eps, scale, dropout_p, seed);
  check_same(grad_out, q, "grad_out");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Double && lse.numel() == a.batch * a.heads * a.queries, "vitkernels::re_attention_backward: lse must be the forward's");
  const int64_t heads = a.heads;
  Weights w{values_of(mix_weight, heads * heads, 0), values_of(mix_bias, heads, 0), values_of(norm_weight, heads, 1), values_of(norm_bias, heads, 0),
            values_of(mean, heads, 0), values_of(var, heads, 1), {}};
  centre_means(a, w);
  for (double& value : w.std) value = std::sqrt(value + eps);
  w.constant = a.norm == Norm::kNone ? w.bias : w.beta;
  for (int64_t g = 0; g < heads && a.norm == Norm::kBatch; ++g) w.constant[g] -= w.gamma[g] / w.std[g] * w.mean[g];
  const Tensor saved_lse = dense(lse);
  a.mix = w.mix.data(), a.mix_bias = w.bias.data(), a.weight = w.gamma.data(), a.constant = w.constant.data();
  a.grad_out = map_of(grad_out), a.lse = static_cast<const double*>(saved_lse.data_ptr());
  a.mean = w.mean.data(), a.std = w.std.data();
  a.live = live;
  const auto grad = [&](bool needed, const Tensor& like) { return torch::stable::new_empty(like, needed ? std::vector<int64_t>{like.size(0), like.size(1), like.size(2), like.size(3)} : std::vector<int64_t>{0}); };
  Tensor grad_q = grad(need_q, q), grad_k = grad(need_k, k), grad_v = grad(need_v, v);
  Tensor grad_mix = torch::stable::new_empty(mix_weight, {heads, heads}), grad_bias = torch::stable::new_empty(mix_weight, {heads});
  Tensor grad_weight = torch::stable::new_empty(mix_weight, {heads}), grad_constant = torch::stable::new_empty(mix_weight, {heads});
  a.grad_q = need_q ? grad_q.data_ptr() : nullptr, a.grad_k = need_k ? grad_k.data_ptr() : nullptr, a.grad_v = need_v ? grad_v.data_ptr() : nullptr;
  const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data_ptr()); };
  a.grad_mix = doubles(grad_mix), a.grad_bias = doubles(grad_bias), a.grad_weight = doubles(grad_weight), a.grad_constant = doubles(grad_constant);
  kernels().backward(a);
  return {grad_q, grad_k, grad_v, grad_mix, grad_bias, grad_weight, grad_constant};
}

}  // namespace vitkernels
