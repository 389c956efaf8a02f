// The batch norm's entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "batch_norm/op.h"

#include "batch_norm/kernels.h"
#include "common/pages.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

const batch_norm::Kernels& kernels() {
  static const batch_norm::Kernels& table = []() -> const batch_norm::Kernels& { VITKERNELS_SELECT_KERNELS(batch_norm_kernels) }();
  return table;
}

// An empty map of this shape in one of the two memory formats.
Tensor empty_map(const Tensor& like, bool channels_last) {
  const int64_t b = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  Tensor map = channels_last ? empty_strided({b, c, h, w}, {h * w * c, 1, w * c, c}, like.scalar_type())
                             : empty_strided({b, c, h, w}, {c * h * w, h * w, w, 1}, like.scalar_type());
  prefer_huge_pages(map.data_ptr(), map.numel() * static_cast<int64_t>(map.element_size()));
  return map;
}

// Whether a map that is not contiguous is so in channels_last; the stride of a dimension of one is nobody's.
bool in_channels_last(const Tensor& map) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (map.size(dim) != 1 && map.stride(dim) != expected) return false;
    expected *= map.size(dim);
  }
  return !map.is_contiguous();
}

// The map in this format, copied where it is in none.
Tensor arranged(const Tensor& map, bool channels_last) {
  if (channels_last ? in_channels_last(map) : map.is_contiguous()) return map;
  Tensor copy = empty_map(map, channels_last);
  torch::stable::copy_(copy, map);
  return copy;
}

void fill(batch_norm::Norm& a, const Tensor& x, bool channels_last, const Tensor& weight, const Tensor& bias, double eps, int64_t activation) {
  a.dtype = dtype_of(x);
  a.batch = x.size(0), a.channels = x.size(1), a.pixels = x.size(2) * x.size(3);
  a.channels_last = channels_last;
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "vitkernels::batch_norm_act: activation must be 0 (none), 1 (relu) or 2 (silu)");
  STD_TORCH_CHECK(a.batch * a.pixels > 1, "vitkernels::batch_norm_act: x must have more than one value a channel");
  a.activation = static_cast<batch_norm::Activation>(activation), a.eps = eps;
  a.weight = weight.data_ptr(), a.bias = bias.data_ptr();
}

void check_channels(const Tensor& x, std::initializer_list<const Tensor*> vectors) {
  STD_TORCH_CHECK(x.dim() == 4, "vitkernels::batch_norm_act: x must be [B, C, H, W]");
  for (const Tensor* vector : vectors) {
    STD_TORCH_CHECK(
        vector->is_contiguous() && vector->numel() == x.size(1) && vector->scalar_type() == accumulation_type(x),
        "vitkernels::batch_norm_act: weight, bias, mean and var must be contiguous [C], of the accumulation dtype");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, int64_t activation) {
  check_channels(x, {&weight, &bias});
  const bool channels_last = in_channels_last(x);
  const Tensor map = arranged(x, channels_last);
  batch_norm::Forward a{};
  fill(a, x, channels_last, weight, bias, eps, activation);
  Tensor y = empty_map(x, channels_last);
  Tensor mean = empty_strided({a.channels}, {1}, accumulation_type(x)), var = empty_strided({a.channels}, {1}, accumulation_type(x));
  a.x = map.data_ptr(), a.y = y.data_ptr(), a.mean = mean.data_ptr(), a.var = var.data_ptr();
  kernels().forward(a);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps, int64_t activation,
    bool need_x) {
  check_channels(x, {&weight, &bias, &mean, &var});
  check_same(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.dim() == 4 && grad_y.numel() == x.numel(), "vitkernels::batch_norm_act_backward: grad_y must have the shape of x");
  const bool channels_last = in_channels_last(x);
  const Tensor map = arranged(x, channels_last), grad = arranged(grad_y, channels_last);
  batch_norm::Backward a{};
  fill(a, x, channels_last, weight, bias, eps, activation);
  Tensor grad_x = need_x ? empty_map(x, channels_last) : empty_strided({0}, {1}, x.scalar_type());
  Tensor grad_weight = empty_strided({a.channels}, {1}, accumulation_type(x)), grad_bias = empty_strided({a.channels}, {1}, accumulation_type(x));
  a.x = map.data_ptr(), a.grad_y = grad.data_ptr(), a.mean = mean.data_ptr(), a.var = var.data_ptr();
  a.grad_x = need_x ? grad_x.data_ptr() : nullptr;
  a.grad_weight = grad_weight.data_ptr(), a.grad_bias = grad_bias.data_ptr();
  kernels().backward(a);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace vitkernels
