// The cascaded-group ops' entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "cascaded_group/op.h"

#include "cascaded_group/kernels.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

const cascaded_group::Kernels& kernels() {
  static const cascaded_group::Kernels& table = []() -> const cascaded_group::Kernels& { VITKERNELS_SELECT_KERNELS(cascaded_group_kernels) }();
  return table;
}

// Contiguous forms of the small arguments, held for the length of a call.
struct Arguments {
  const Tensor &x, &qkv_weight, &proj_weight;
  const std::optional<Tensor> qkv_bias, dw_bias, proj_bias;
  const Tensor dw_weight, attention_bias;
  const std::vector<int64_t>& kernel_sizes;
  const int64_t key_dim;

  // Shapes are checked in Python with full messages; this guards direct callers of torch.ops from reading out of bounds.
  void check(int64_t window) const {
    STD_TORCH_CHECK(x.dim() == 4 && qkv_weight.dim() == 3 && proj_weight.dim() == 2, "vitkernels::cascaded_group_attention: x, qkv_weight and proj_weight must have 4, 3 and 2 dimensions");
    const int64_t heads = qkv_weight.size(0), channels = x.size(1), value_dim = qkv_weight.size(1) - 2 * key_dim;
    STD_TORCH_CHECK(heads > 0 && channels == heads * qkv_weight.size(2), "vitkernels::cascaded_group_attention: qkv_weight must be [heads, 2 * key_dim + d, C / heads]");
    STD_TORCH_CHECK(key_dim > 0 && value_dim > 0 && (heads == 1 || value_dim == qkv_weight.size(2)), "vitkernels::cascaded_group_attention: qkv_weight must be [heads, 2 * key_dim + d, C / heads]");
    STD_TORCH_CHECK(proj_weight.size(0) == channels && proj_weight.size(1) == heads * value_dim, "vitkernels::cascaded_group_attention: proj_weight must be [C, heads * d]");
    STD_TORCH_CHECK(static_cast<int64_t>(kernel_sizes.size()) == heads, "vitkernels::cascaded_group_attention: kernel_sizes needs one entry per head");
    int64_t taps = 0;
    for (const int64_t k : kernel_sizes) {
      STD_TORCH_CHECK(k > 0 && k % 2 == 1, "vitkernels::cascaded_group_attention: a kernel size must be odd");
      taps += k * k;
    }
    STD_TORCH_CHECK(window > 0 && attention_bias.numel() == heads * window * window, "vitkernels::cascaded_group_attention: attention_bias must be [heads, window * window]");
    const auto length = [&](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
      if (!tensor) return;
      check_same(*tensor, x, name);
      STD_TORCH_CHECK(tensor->numel() == count, "vitkernels::cascaded_group_attention: ", name, " has the wrong length");
    };
    length(dw_weight, key_dim * taps, "dw_weight");
    length(qkv_bias, heads * qkv_weight.size(1), "qkv_bias");
    length(dw_bias, heads * key_dim, "dw_bias");
    length(proj_bias, channels, "proj_bias");
    check_same(qkv_weight, x, "qkv_weight");
    check_same(proj_weight, x, "proj_weight");
    check_same(attention_bias, x, "attention_bias");
  }

  void fill(cascaded_group::Attention& args, double scale, int64_t window) const {
    args.dtype = dtype_of(x);
    args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
    args.heads = qkv_weight.size(0), args.key_dim = key_dim, args.value_dim = qkv_weight.size(1) - 2 * key_dim, args.window = window;
    args.kernel_sizes = kernel_sizes.data();
    args.scale = scale;
    args.x = map_of(x);
    args.qkv_weight = {qkv_weight.data_ptr(), qkv_weight.stride(0), qkv_weight.stride(1), qkv_weight.stride(2)};
    args.qkv_bias = data_of(qkv_bias);
    args.dw_weight = dw_weight.data_ptr();
    args.dw_bias = data_of(dw_bias);
    args.attention_bias = attention_bias.data_ptr();
    args.proj_weight = {proj_weight.data_ptr(), 0, proj_weight.stride(0), proj_weight.stride(1)};
  }
};

void check_grad(const Tensor& grad_y, const Tensor& x) {
  check_same(grad_y, x, "grad_y");
  STD_TORCH_CHECK(
      grad_y.dim() == 4 && grad_y.size(0) == x.size(0) && grad_y.size(1) == x.size(1) && grad_y.size(2) == x.size(2) && grad_y.size(3) == x.size(3),
      "vitkernels::cascaded_group_attention: grad_y must have the shape of x");
}

}  // namespace

Tensor cascaded_group_attention(
    const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
    const Tensor& attention_bias, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias, std::vector<int64_t> kernel_sizes, int64_t key_dim,
    double scale, int64_t window) {
  const Arguments given{x, qkv_weight, proj_weight, dense(qkv_bias), dense(dw_bias), dense(proj_bias), dense(dw_weight), dense(attention_bias), kernel_sizes, key_dim};
  given.check(window);
  Tensor y = torch::stable::empty_like(x);
  cascaded_group::Forward args{};
  given.fill(args, scale, window);
  args.proj_bias = data_of(given.proj_bias);
  args.y = map_of(y);
  kernels().forward(args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight,
    const std::optional<Tensor>& dw_bias, const Tensor& attention_bias, const Tensor& proj_weight, std::vector<int64_t> kernel_sizes, int64_t key_dim,
    double scale, int64_t window, bool need_x, bool need_weights) {
  const Arguments given{x, qkv_weight, proj_weight, dense(qkv_bias), dense(dw_bias), std::nullopt, dense(dw_weight), dense(attention_bias), kernel_sizes, key_dim};
  given.check(window);
  check_grad(grad_y, x);
  const int64_t heads = qkv_weight.size(0), rows = qkv_weight.size(1);
  const auto grad = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x, need_weights ? shape : std::vector<int64_t>{0}); };
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_qkv_weight = grad({heads, rows, qkv_weight.size(2)}), grad_qkv_bias = grad({heads, rows});
  Tensor grad_dw_weight = grad({dw_weight.numel()}), grad_dw_bias = grad({heads, key_dim});
  Tensor grad_attention_bias = grad({heads, window * window});
  Tensor grad_proj_weight = grad({proj_weight.size(0), proj_weight.size(1)}), grad_proj_bias = grad({proj_weight.size(0)});
  cascaded_group::Backward args{};
  given.fill(args, scale, window);
  args.grad_y = map_of(grad_y);
  if (need_x) args.grad.x = map_of(grad_x);
  if (need_weights) {
    args.grad.qkv_weight = grad_qkv_weight.data_ptr(), args.grad.qkv_bias = grad_qkv_bias.data_ptr();
    args.grad.dw_weight = grad_dw_weight.data_ptr(), args.grad.dw_bias = grad_dw_bias.data_ptr();
    args.grad.attention_bias = grad_attention_bias.data_ptr();
    args.grad.proj_weight = grad_proj_weight.data_ptr(), args.grad.proj_bias = grad_proj_bias.data_ptr();
  }
  kernels().backward(args);
  return {grad_x, grad_qkv_weight, grad_qkv_bias, grad_dw_weight, grad_dw_bias, grad_attention_bias, grad_proj_weight, grad_proj_bias};
}

namespace {

int64_t windows_of(const Tensor& x, int64_t window) {
  const auto along = [&](int64_t size) { return (size + window - 1) / window; };
  return x.size(0) * along(x.size(2)) * along(x.size(3));
}

// The norms' parameters and statistics, checked. `mean` and `var` hold the channels of every qkv norm, then of the depthwise ones, then of the projection's.
cascaded_group::Norms norms_of(
    const Arguments& given, const Tensor& qkv_gamma, const Tensor* qkv_beta, const Tensor& dw_gamma, const Tensor* dw_beta, const Tensor& proj_gamma,
    const Tensor* proj_beta, const Tensor& mean, const Tensor& var, double eps) {
  const auto accumulation = accumulation_type(given.x);
  const int64_t heads = given.qkv_weight.size(0), qkv = heads * given.qkv_weight.size(1), dw = heads * given.key_dim, proj = given.x.size(1);
  const auto check = [&](const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == accumulation && tensor.numel() == count && tensor.is_contiguous(),
        "vitkernels::cascaded_group_attention_batch_norm: norms and statistics must be contiguous, in the accumulation type, one value per channel");
  };
  check(mean, qkv + dw + proj);
  check(var, qkv + dw + proj);
  const int64_t size = accumulation == ScalarType::Double ? 8 : 4;
  const auto norm = [&](const Tensor& gamma, const Tensor* beta, int64_t first, int64_t count) {
    check(gamma, count);
    if (beta) check(*beta, count);
    const auto part = [&](const Tensor& statistics) { return static_cast<char*>(statistics.data_ptr()) + first * size; };
    return cascaded_group::Norm{gamma.data_ptr(), beta ? beta->data_ptr() : nullptr, part(mean), part(var)};
  };
  return {norm(qkv_gamma, qkv_beta, 0, qkv), norm(dw_gamma, dw_beta, qkv, dw), norm(proj_gamma, proj_beta, qkv + dw, proj), eps};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_batch_norm(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& qkv_gamma, const Tensor& qkv_beta, const Tensor& dw_weight, const Tensor& dw_gamma,
    const Tensor& dw_beta, const Tensor& attention_bias, const Tensor& proj_weight, const Tensor& proj_gamma, const Tensor& proj_beta,
    std::vector<int64_t> kernel_sizes, int64_t key_dim, double scale, int64_t window, double eps) {
  const Arguments given{x, qkv_weight, proj_weight, std::nullopt, std::nullopt, std::nullopt, dense(dw_weight), dense(attention_bias), kernel_sizes, key_dim};
  given.check(window);
  const auto accumulation = accumulation_type(x);
  const int64_t heads = qkv_weight.size(0), split = qkv_weight.size(2), channels = x.size(1), normed = heads * (qkv_weight.size(1) + key_dim) + channels;
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {normed}, accumulation), var = torch::stable::new_empty(x, {normed}, accumulation);
  Tensor projected = torch::stable::new_empty(x, {windows_of(x, window) * window * window, channels}, accumulation);
  Tensor moments = torch::stable::new_empty(x, {heads, 1 + split, split}, accumulation);
  const Tensor gammas[] = {dense(qkv_gamma), dense(dw_gamma), dense(proj_gamma)}, betas[] = {dense(qkv_beta), dense(dw_beta), dense(proj_beta)};
  cascaded_group::NormForward args{};
  given.fill(args, scale, window);
  args.norms = norms_of(given, gammas[0], &betas[0], gammas[1], &betas[1], gammas[2], &betas[2], mean, var, eps);
  args.y = map_of(y);
  args.projected = projected.data_ptr(), args.moments = moments.data_ptr();
  kernels().norm_forward(args);
  return {y, mean, var, projected, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_batch_norm_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const Tensor& qkv_gamma, const Tensor& qkv_beta, const Tensor& dw_weight,
    const Tensor& dw_gamma, const Tensor& dw_beta, const Tensor& attention_bias, const Tensor& proj_weight, const Tensor& proj_gamma, const Tensor& mean,
    const Tensor& var, const Tensor& projected, const Tensor& moments, std::vector<int64_t> kernel_sizes, int64_t key_dim, double scale, int64_t window,
    double eps, bool need_x, bool need_weights) {
  const Arguments given{x, qkv_weight, proj_weight, std::nullopt, std::nullopt, std::nullopt, dense(dw_weight), dense(attention_bias), kernel_sizes, key_dim};
  given.check(window);
  check_grad(grad_y, x);
  const auto accumulation = accumulation_type(x);
  const int64_t heads = qkv_weight.size(0), rows = qkv_weight.size(1), split = qkv_weight.size(2), channels = x.size(1);
  const auto saved = [&](const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == accumulation && tensor.numel() == count,
        "vitkernels::cascaded_group_attention_batch_norm_backward: mean, var, projected and moments must be the forward's");
    return dense(tensor);
  };
  const Tensor saved_projected = saved(projected, windows_of(x, window) * window * window * channels), saved_moments = saved(moments, heads * (1 + split) * split);
  const Tensor saved_mean = dense(mean), saved_var = dense(var);
  const Tensor gammas[] = {dense(qkv_gamma), dense(dw_gamma), dense(proj_gamma)}, betas[] = {dense(qkv_beta), dense(dw_beta)};
  const auto grad = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x, need_weights ? shape : std::vector<int64_t>{0}); };
  const auto grad_norm = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x, need_weights ? shape : std::vector<int64_t>{0}, accumulation); };
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_qkv_weight = grad({heads, rows, split}), grad_qkv_gamma = grad_norm({heads, rows}), grad_qkv_beta = grad_norm({heads, rows});
  Tensor grad_dw_weight = grad({dw_weight.numel()}), grad_dw_gamma = grad_norm({heads, key_dim}), grad_dw_beta = grad_norm({heads, key_dim});
  Tensor grad_attention_bias = grad({heads, window * window});
  Tensor grad_proj_weight = grad({proj_weight.size(0), proj_weight.size(1)}), grad_proj_gamma = grad_norm({channels}), grad_proj_beta = grad_norm({channels});
  cascaded_group::NormBackward args{};
  given.fill(args, scale, window);
  // The projection's beta shifts the output only: no gradient depends on it.
  args.norms = norms_of(given, gammas[0], &betas[0], gammas[1], &betas[1], gammas[2], nullptr, saved_mean, saved_var, eps);
  args.grad_y = map_of(grad_y);
  args.projected = saved_projected.data_ptr(), args.moments = saved_moments.data_ptr();
  if (need_x) args.grad.x = map_of(grad_x);
  if (need_weights) {
    args.grad.qkv_weight = grad_qkv_weight.data_ptr(), args.grad.dw_weight = grad_dw_weight.data_ptr();
    args.grad.attention_bias = grad_attention_bias.data_ptr(), args.grad.proj_weight = grad_proj_weight.data_ptr();
    args.grad_qkv_gamma = grad_qkv_gamma.data_ptr(), args.grad_qkv_beta = grad_qkv_beta.data_ptr();
    args.grad_dw_gamma = grad_dw_gamma.data_ptr(), args.grad_dw_beta = grad_dw_beta.data_ptr();
    args.grad_proj_gamma = grad_proj_gamma.data_ptr(), args.grad_proj_beta = grad_proj_beta.data_ptr();
  }
  kernels().norm_backward(args);
  return {grad_x, grad_qkv_weight, grad_qkv_gamma, grad_qkv_beta, grad_dw_weight, grad_dw_gamma, grad_dw_beta, grad_attention_bias, grad_proj_weight,
          grad_proj_gamma, grad_proj_beta};
}

}  // namespace vitkernels
