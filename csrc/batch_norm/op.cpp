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

// Whether the map is read as channels_last: where it lies so and, in a dimension of one, not both ways.
bool by_pixels(const Tensor& map) { return channels_last(map) && !map.is_contiguous(); }

// An empty map of this shape, for results of training.
Tensor empty_result(const Tensor& like, bool by_pixels) {
  Tensor map = empty_map(like.size(0), like.size(1), like.size(2), like.size(3), by_pixels, like.scalar_type());
  prefer_huge_pages(map.data_ptr(), map.numel() * static_cast<int64_t>(map.element_size()));
  return map;
}

// The map in this memory format, copied where it is in another.
Tensor arranged(const Tensor& map, bool by_pixels) {
  if (by_pixels ? channels_last(map) : map.is_contiguous()) return map;
  Tensor copy = empty_result(map, by_pixels);
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
  const bool channels_last = by_pixels(x);
  const Tensor map = arranged(x, channels_last);
  batch_norm::Forward a{};
  fill(a, x, channels_last, weight, bias, eps, activation);
  Tensor y = empty_result(x, channels_last);
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
  const bool channels_last = by_pixels(x);
  const Tensor map = arranged(x, channels_last), grad = arranged(grad_y, channels_last);
  batch_norm::Backward a{};
  fill(a, x, channels_last, weight, bias, eps, activation);
  Tensor grad_x = need_x ? empty_result(x, channels_last) : empty_strided({0}, {1}, x.scalar_type());
  Tensor grad_weight = empty_strided({a.channels}, {1}, accumulation_type(x)), grad_bias = empty_strided({a.channels}, {1}, accumulation_type(x));
  a.x = map.data_ptr(), a.grad_y = grad.data_ptr(), a.mean = mean.data_ptr(), a.var = var.data_ptr();
  a.grad_x = need_x ? grad_x.data_ptr() : nullptr;
  a.grad_weight = grad_weight.data_ptr(), a.grad_bias = grad_bias.data_ptr();
  kernels().backward(a);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace vitkernels
