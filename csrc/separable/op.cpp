// The separable ops' entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "separable/op.h"

#include "bottleneck/op.h"
#include "common/stable.h"
#include "separable/kernels.h"

namespace vitkernels {
namespace {

const separable::Kernels& kernels() {
  static const separable::Kernels& table = []() -> const separable::Kernels& { VITKERNELS_SELECT_KERNELS(separable_kernels) }();
  return table;
}

// Shapes are checked in Python with full messages; these guard direct callers of torch.ops from reading out of bounds.
void check_self(const Tensor& x, const Tensor& qkv_weight, const Tensor& out_weight, int64_t patch_h, int64_t patch_w) {
  STD_TORCH_CHECK(x.dim() == 4, "vitkernels::separable_self_attention: x must be 4-dimensional");
  const int64_t dim = x.size(1);
  check_same(qkv_weight, x, "qkv_weight");
  check_same(out_weight, x, "out_weight");
  STD_TORCH_CHECK(qkv_weight.numel() == (1 + 2 * dim) * dim, "vitkernels::separable_self_attention: qkv_weight must be [1 + 2d, d]");
  STD_TORCH_CHECK(out_weight.numel() == dim * dim, "vitkernels::separable_self_attention: out_weight must be [d, d]");
  const bool divides = patch_h > 0 ? patch_w > 0 && x.size(2) % patch_h == 0 && x.size(3) % patch_w == 0 : x.numel() == 0;
  STD_TORCH_CHECK(divides, "vitkernels::separable_self_attention: the patch size must divide the map");
}

void check_length(const std::optional<Tensor>& tensor, const Tensor& like, int64_t length, const char* name) {
  if (!tensor) return;
  check_same(*tensor, like, name);
  STD_TORCH_CHECK(tensor->numel() == length, "vitkernels::separable_self_attention: ", name, " has the wrong length");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> separable_self_attention(
    const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const std::optional<Tensor>& out_bias,
    const std::optional<Tensor>& score_scale, int64_t patch_h, int64_t patch_w) {
  check_self(x, qkv_weight, out_weight, patch_h, patch_w);
  const int64_t batch = x.size(0), dim = x.size(1), height = x.size(2), width = x.size(3);
  check_length(qkv_bias, x, 1 + 2 * dim, "qkv_bias");
  check_length(out_bias, x, dim, "out_bias");
  const auto accumulation = accumulation_type(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor logits = torch::stable::new_empty(x, {batch, height, width}, accumulation);
  Tensor stats = torch::stable::new_empty(x, {batch, patch_h * patch_w, 2}, accumulation);
  Tensor pooled = torch::stable::new_empty(x, {batch, patch_h * patch_w, dim}, accumulation);
  const Tensor qkv = dense(qkv_weight), out = dense(out_weight);
  const auto qkv_b = dense(qkv_bias), out_b = dense(out_bias), scale = dense(score_scale);

  separable::SelfForward args{};
  args.dtype = dtype_of(x);
  args.batch = batch, args.dim = dim, args.height = height, args.width = width, args.patch_h = patch_h, args.patch_w = patch_w;
  args.x = map_of(x), args.y = map_of(y);
  args.qkv_weight = qkv.data_ptr(), args.qkv_bias = data_of(qkv_b);
  args.out_weight = out.data_ptr(), args.out_bias = data_of(out_b);
  args.score_scale = data_of(scale);
  args.logits = logits.data_ptr(), args.stats = stats.data_ptr(), args.pooled = pooled.data_ptr();
  kernels().self_forward(args);
  return {y, logits, stats, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> separable_self_attention_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& out_weight,
    const std::optional<Tensor>& score_scale, const Tensor& logits, const Tensor& stats, const Tensor& pooled, int64_t patch_h, int64_t patch_w, bool need_x,
    bool need_qkv, bool need_out) {
  check_self(x, qkv_weight, out_weight, patch_h, patch_w);
  check_same(grad_y, x, "grad_y");
  const int64_t batch = x.size(0), dim = x.size(1), height = x.size(2), width = x.size(3), groups = patch_h * patch_w;
  STD_TORCH_CHECK(
      grad_y.dim() == 4 && grad_y.size(0) == batch && grad_y.size(1) == dim && grad_y.size(2) == height && grad_y.size(3) == width,
      "vitkernels::separable_self_attention_backward: grad_y must have the shape of x");
  STD_TORCH_CHECK(
      logits.numel() == batch * height * width && stats.numel() == batch * groups * 2 && pooled.numel() == batch * groups * dim,
      "vitkernels::separable_self_attention_backward: logits, stats and pooled must be the forward's");
  check_length(qkv_bias, x, 1 + 2 * dim, "qkv_bias");
  const auto grad = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(x, like.sizes()) : torch::stable::new_empty(x, {0});
  };
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_qkv_weight = grad(need_qkv, qkv_weight), grad_out_weight = grad(need_out, out_weight);
  Tensor grad_qkv_bias = torch::stable::new_empty(x, {need_qkv ? 1 + 2 * dim : 0});
  Tensor grad_out_bias = torch::stable::new_empty(x, {need_out ? dim : 0});
  const Tensor qkv = dense(qkv_weight), out = dense(out_weight), saved_logits = dense(logits), saved_stats = dense(stats), saved_pooled = dense(pooled);
  const auto qkv_b = dense(qkv_bias), scale = dense(score_scale);

  separable::SelfBackward args{};
  args.dtype = dtype_of(x);
  args.batch = batch, args.dim = dim, args.height = height, args.width = width, args.patch_h = patch_h, args.patch_w = patch_w;
  args.x = map_of(x), args.grad_y = map_of(grad_y);
  args.qkv_weight = qkv.data_ptr(), args.qkv_bias = data_of(qkv_b);
  args.out_weight = out.data_ptr();
  args.score_scale = data_of(scale);
  args.logits = saved_logits.data_ptr(), args.stats = saved_stats.data_ptr(), args.pooled = saved_pooled.data_ptr();
  if (need_x) args.grad_x = map_of(grad_x);
  if (need_qkv) args.grad_qkv_weight = grad_qkv_weight.data_ptr(), args.grad_qkv_bias = grad_qkv_bias.data_ptr();
  if (need_out) args.grad_out_weight = grad_out_weight.data_ptr(), args.grad_out_bias = grad_out_bias.data_ptr();
  kernels().self_backward(args);
  return {grad_x, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias};
}

std::tuple<Tensor, Tensor, Tensor> separable_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "vitkernels::separable_attention: q, k and v must be 4-dimensional");
  const int64_t batch = k.size(0), dim = k.size(1), positions = k.size(2), patches = k.size(3);
  check_same(k, q, "k");
  check_same(v, q, "v");
  const auto agrees = [&](const Tensor& t, int64_t channels) {
    return t.size(0) == batch && t.size(1) == channels && t.size(2) == positions && t.size(3) == patches;
  };
  STD_TORCH_CHECK(agrees(q, 1) && agrees(v, dim), "vitkernels::separable_attention: q must be [B, 1, P, N] and v must have the shape of k");
  const auto accumulation = accumulation_type(v);
  Tensor out = torch::stable::new_empty(v, {batch, dim, positions, patches});
  Tensor scores = torch::stable::new_empty(v, {batch, positions, patches}, accumulation);
  Tensor context = torch::stable::new_empty(v, {batch, positions, dim}, accumulation);
  separable::CoreForward args{};
  args.dtype = dtype_of(v);
  args.batch = batch, args.dim = dim, args.positions = positions, args.patches = patches;
  args.q = map_of(q), args.k = map_of(k), args.v = map_of(v);
  args.out = out.data_ptr(), args.scores = scores.data_ptr(), args.context = context.data_ptr();
  kernels().core_forward(args);
  return {out, scores, context};
}

std::tuple<Tensor, Tensor, Tensor> separable_attention_backward(
    const Tensor& grad_out, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& context, bool need_q, bool need_k, bool need_v) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && grad_out.dim() == 4, "vitkernels::separable_attention_backward: k, v and grad_out must be 4-dimensional");
  const int64_t batch = k.size(0), dim = k.size(1), positions = k.size(2), patches = k.size(3);
  check_same(grad_out, k, "grad_out");
  check_same(v, k, "v");
  STD_TORCH_CHECK(
      grad_out.numel() == k.numel() && v.numel() == k.numel() && scores.numel() == batch * positions * patches &&
          context.numel() == batch * positions * dim,
      "vitkernels::separable_attention_backward: shapes do not belong together");
  const auto grad = [&](bool needed, int64_t channels) {
    return needed ? torch::stable::new_empty(k, {batch, channels, positions, patches}) : torch::stable::new_empty(k, {0});
  };
  Tensor grad_q = grad(need_q, 1), grad_k = grad(need_k, dim), grad_v = grad(need_v, dim);
  const Tensor saved_scores = dense(scores), saved_context = dense(context);
  separable::CoreBackward args{};
  args.dtype = dtype_of(k);
  args.batch = batch, args.dim = dim, args.positions = positions, args.patches = patches;
  args.grad_out = map_of(grad_out), args.k = map_of(k), args.v = map_of(v);
  args.scores = saved_scores.data_ptr(), args.context = saved_context.data_ptr();
  args.grad_q = need_q ? grad_q.data_ptr() : nullptr;
  args.grad_k = need_k ? grad_k.data_ptr() : nullptr;
  args.grad_v = need_v ? grad_v.data_ptr() : nullptr;
  kernels().core_backward(args);
  return {grad_q, grad_k, grad_v};
}

Tensor separable_layer(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& query_weight, const Tensor& query_bias,
    const Tensor& key_weight, const Tensor& key_bias, const Tensor& value_weight, const Tensor& value_bias, const Tensor& out_weight, const Tensor& out_bias,
    double eps, int64_t patch_h, int64_t patch_w) {
  STD_TORCH_CHECK(x.dim() == 4 && channels_last(x), "vitkernels::separable_layer: x must be [B, d, H, W] in channels_last memory");
  const int64_t batch = x.size(0), dim = x.size(1), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(
      patch_h > 0 && patch_w > 0 && height % patch_h == 0 && width % patch_w == 0, "vitkernels::separable_layer: the patch size must divide the map");
  const ScalarType type = accumulation_type(x);
  const int64_t padded = (dim + bottleneck::kPanel - 1) / bottleneck::kPanel * bottleneck::kPanel;
  STD_TORCH_CHECK(
      query_weight.numel() == padded && query_weight.is_contiguous() && query_weight.scalar_type() == type && query_bias.numel() == 1 && query_bias.scalar_type() == type,
      "vitkernels::separable_layer: query_weight must be contiguous [", padded, "] of the accumulation dtype, query_bias one number of it");
  separable::Layer a{};
  a.dtype = dtype_of(x);
  a.batch = batch, a.height = a.out_height = height, a.width = a.out_width = width, a.in = a.hidden = a.out = a.x_row = a.y_row = dim;
  a.patch_height = patch_h, a.patch_width = patch_w;
  a.norm = bottleneck::Norm::kSample, a.eps = eps;
  a.norm_weight = bottleneck::checked_norm(norm_weight, dim, type), a.norm_bias = bottleneck::checked_norm(norm_bias, dim, type);
  a.query = query_weight.data_ptr(), a.query_bias = query_bias.data_ptr();
  a.pairs = bottleneck::pairs_of(x, out_weight, dim, dim);
  const auto panels = [&](const Tensor& weight, const Tensor& bias, ScalarType weights, const char* name, const void*& weight_data, const void*& bias_data) {
    weight_data = bottleneck::checked_panels(weight, bias, dim, dim, weights, type, name), bias_data = bias.data_ptr();
  };
  const ScalarType weights = a.pairs ? ScalarType::BFloat16 : type;
  panels(key_weight, key_bias, type, "key_weight", a.key_weight, a.key_bias);
  panels(value_weight, value_bias, weights, "value_weight", a.expand_weight, a.expand_bias);
  panels(out_weight, out_bias, weights, "out_weight", a.project_weight, a.project_bias);
  a.activation = bottleneck::Activation::kRelu;
  Tensor y = empty_map(batch, dim, height, width, true, x.scalar_type());
  a.x = a.residual = x.data_ptr(), a.y = y.data_ptr();
  if (x.numel() != 0) kernels().layer_forward(a);
  return y;
}

}  // namespace vitkernels
