// The op's entry points on a GPU: tensors to plain structs, memory laid out and allocated, the kernels launched on the current stream.
//
// No call waits for the GPU and nothing is read back, so a CUDA graph can capture all of it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "cascaded_group/cuda_kernels.h"
#include "common/cuda_device.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

using cascaded_group::cuda::BackwardArguments;
using cascaded_group::cuda::ForwardArguments;
using cascaded_group::cuda::kMaxChannels;
using cascaded_group::cuda::kMaxHeads;
using cascaded_group::cuda::kMaxWindow;
using cascaded_group::cuda::Launch;
using cascaded_group::cuda::Shape;
using cascaded_group::cuda::WeightGradients;
using cascaded_group::cuda::Weights;

constexpr const char* kOp = "vitkernels::cascaded_group_attention";

// Shapes are checked in Python with full messages; these guard direct callers of torch.ops from reading out of bounds, and say what these kernels
// have no form for.
Shape shape_of(const Tensor& x, const Tensor& qkv_weight, const std::vector<int64_t>& kernel_sizes, int64_t key_dim, int64_t window) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must be 4-dimensional");
  STD_TORCH_CHECK(qkv_weight.dim() == 3, kOp, ": qkv_weight must be [heads, 2 * key_dim + d, C / heads]");
  const int64_t heads = qkv_weight.size(0), rows = qkv_weight.size(1), split = qkv_weight.size(2), value_dim = rows - 2 * key_dim;
  STD_TORCH_CHECK(
      window >= 1 && window <= kMaxWindow, kOp, ": the CUDA kernels have windows of 1 to ", kMaxWindow, " pixels a side; this one has ", window);
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxHeads, kOp, ": the CUDA kernels have 1 to ", kMaxHeads, " heads; there are ", heads);
  STD_TORCH_CHECK(key_dim >= 1 && value_dim >= 1 && split >= 1, kOp, ": qkv_weight must be [heads, 2 * key_dim + d, C / heads]");
  STD_TORCH_CHECK(heads == 1 || value_dim == split, kOp, ": with more than one head d must be C / heads");
  STD_TORCH_CHECK(
      x.size(1) == heads * split && x.size(1) <= kMaxChannels && rows <= kMaxChannels && heads * value_dim <= kMaxChannels, kOp, ": x has ",
      x.size(1), " channels; it must be heads * (C / heads), and no axis of a weight longer than ", kMaxChannels);
  STD_TORCH_CHECK(x.size(2) <= (1 << 30) && x.size(3) <= (1 << 30), kOp, ": a side of x is longer than 2^30");
  STD_TORCH_CHECK(static_cast<int64_t>(kernel_sizes.size()) == heads, kOp, ": kernel_sizes needs one entry per head");
  Shape shape{};
  shape.batch = x.size(0);
  shape.height = static_cast<int>(x.size(2)), shape.width = static_cast<int>(x.size(3));
  shape.heads = static_cast<int>(heads), shape.split = static_cast<int>(split), shape.value_dim = static_cast<int>(value_dim);
  shape.key_dim = static_cast<int>(key_dim), shape.window = static_cast<int>(window);
  for (int64_t i = 0; i < heads; ++i) {
    STD_TORCH_CHECK(kernel_sizes[i] >= 1 && kernel_sizes[i] % 2 == 1 && kernel_sizes[i] < 256, kOp, ": kernel_sizes must be odd and below 256");
    shape.kernel_sizes[i] = static_cast<int>(kernel_sizes[i]);
  }
  return shape;
}

void check_numel(const Tensor& tensor, const Tensor& like, int64_t count, const char* name) {
  check_same(tensor, like, name);
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), kOp, ": ", name, " must be on the device of x");
  STD_TORCH_CHECK(tensor.numel() == count, kOp, ": ", name, " has ", tensor.numel(), " elements; it must have ", count);
}

// The weights made dense, kept alive while the launches are made.
struct DenseWeights {
  DenseWeights(
      const Shape& shape, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias_, const Tensor& dw_weight,
      const std::optional<Tensor>& dw_bias_, const Tensor& attention_bias, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias_)
      : qkv(dense(qkv_weight)),
        dw(dense(dw_weight)),
        table(dense(attention_bias)),
        proj(dense(proj_weight)),
        qkv_bias(dense(qkv_bias_)),
        dw_bias(dense(dw_bias_)),
        proj_bias(dense(proj_bias_)) {
    const int64_t heads = shape.heads, channels = shape.channels();
    check_numel(qkv, x, heads * shape.qkv_rows() * shape.split, "qkv_weight");
    check_numel(dw, x, dw_offset(shape, shape.heads), "dw_weight");
    check_numel(table, x, heads * shape.tokens(), "attention_bias");
    check_numel(proj, x, channels * heads * shape.value_dim, "proj_weight");
    if (qkv_bias) check_numel(*qkv_bias, x, heads * shape.qkv_rows(), "qkv_bias");
    if (dw_bias) check_numel(*dw_bias, x, heads * shape.key_dim, "dw_bias");
    if (proj_bias) check_numel(*proj_bias, x, channels, "proj_bias");
    const auto paired = [](const Tensor& tensor, int64_t columns) {
      return columns % 2 == 0 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (2 * tensor.element_size()) == 0;
    };
    pointers = {qkv.data_ptr(),     data_of(qkv_bias),        dw.data_ptr(),
                data_of(dw_bias),   table.data_ptr(),         proj.data_ptr(),
                data_of(proj_bias), paired(qkv, shape.split), paired(proj, shape.value_dim)};
  }
  Tensor qkv, dw, table, proj;
  std::optional<Tensor> qkv_bias, dw_bias, proj_bias;
  Weights pointers;
};

// f(Launch<T>{}) for the element type T of a tensor.
template <class F>
void with_launch(const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(Launch<float>{});
    case ScalarType::BFloat16: return f(Launch<BFloat16>{});
    case ScalarType::Half: return f(Launch<Float16>{});
    default: STD_TORCH_CHECK(false, kOp, ": the dtype must be float32, bfloat16 or float16 on a GPU");
  }
}

// Memory for the blocks of a grid; it goes back to PyTorch's allocator when the call ends, which keeps it until the stream has passed the launches.
Tensor workspace_for(const Tensor& like, int64_t bytes) { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); }

Tensor cascaded_group_attention(
    const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
    const Tensor& attention_bias, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias, const std::vector<int64_t>& kernel_sizes,
    int64_t key_dim, double scale, int64_t window) {
  const Shape shape = shape_of(x, qkv_weight, kernel_sizes, key_dim, window);
  const cuda::Device device(x);
  const DenseWeights weights(shape, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, proj_bias);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;

  ForwardArguments args{};
  args.shape = shape;
  args.layout = forward_layout(shape, static_cast<int64_t>(x.element_size()), device.shared_limit);
  args.x = map_of(x), args.y = map_of(y);
  args.weights = weights.pointers;
  args.scale = static_cast<float>(scale);
  const int64_t largest_grid = args.layout.workspace_bytes > 0 ? device.multiprocessors : (int64_t{1} << 31) - 1;
  const int64_t blocks = std::min(shape.windows(), largest_grid);
  const Tensor workspace = workspace_for(x, blocks * args.layout.workspace_bytes);
  args.workspace = static_cast<char*>(workspace.data_ptr());
  with_launch(x, [&](auto launch) { STD_CUDA_CHECK(launch.forward(args, blocks, device.stream)); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascaded_group_attention_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& dw_weight,
    const std::optional<Tensor>& dw_bias, const Tensor& attention_bias, const Tensor& proj_weight, const std::vector<int64_t>& kernel_sizes,
    int64_t key_dim, double scale, int64_t window, bool need_x, bool need_weights) {
  const Shape shape = shape_of(x, qkv_weight, kernel_sizes, key_dim, window);
  const cuda::Device device(x);
  const DenseWeights weights(shape, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, std::nullopt);
  check_same(grad_y, x, "grad_y");
  STD_TORCH_CHECK(
      grad_y.dim() == 4 && grad_y.size(0) == x.size(0) && grad_y.size(1) == x.size(1) && grad_y.size(2) == x.size(2) && grad_y.size(3) == x.size(3),
      kOp, "_backward: grad_y must have the shape of x");
  const auto grad = [&](bool needed, const std::vector<int64_t>& sizes) {
    return needed ? torch::stable::new_empty(x, sizes) : torch::stable::new_empty(x, {0});
  };
  const int64_t heads = shape.heads, rows = shape.qkv_rows(), split = shape.split, channels = shape.channels();
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  std::array<Tensor, WeightGradients::kCount> grads = {
      grad(need_weights, {heads, rows, split}), grad(need_weights, {heads, rows}),           grad(need_weights, {dw_offset(shape, shape.heads)}),
      grad(need_weights, {heads, key_dim}),     grad(need_weights, {heads, shape.tokens()}), grad(need_weights, {channels, heads * shape.value_dim}),
      grad(need_weights, {channels}),
  };

  BackwardArguments args{};
  args.shape = shape;
  args.layout = backward_layout(shape, static_cast<int64_t>(x.element_size()), device.shared_limit);
  args.offsets = gradient_offsets(shape);
  args.grad_y = map_of(grad_y), args.x = map_of(x);
  if (need_x) args.grad_x = map_of(grad_x);
  args.weights = weights.pointers;
  args.scale = static_cast<float>(scale);
  args.need_x = need_x, args.need_weights = need_weights;
  const int64_t blocks = std::min<int64_t>(shape.windows(), device.multiprocessors), total = args.offsets.total;
  const Tensor workspace = workspace_for(x, blocks * args.layout.workspace_bytes);
  const Tensor partial = torch::stable::new_empty(x, {need_weights ? blocks * total : 0}, ScalarType::Float);
  args.workspace = static_cast<char*>(workspace.data_ptr());
  args.partial = static_cast<float*>(partial.data_ptr());
  WeightGradients gradients{};
  const std::array<int64_t, WeightGradients::kCount> ends = {
      args.offsets.qkv_bias, args.offsets.dw, args.offsets.dw_bias, args.offsets.table, args.offsets.proj, args.offsets.proj_bias, total};
  for (int i = 0; i < WeightGradients::kCount; ++i) gradients.data[i] = grads[i].data_ptr(), gradients.end[i] = ends[i];
  with_launch(x, [&](auto launch) {
    if (blocks > 0 && (need_x || need_weights)) STD_CUDA_CHECK(launch.backward(args, blocks, device.stream));
    if (need_weights) STD_CUDA_CHECK(launch.weight_gradients(args.partial, blocks, total, gradients, device.stream));
  });
  return {grad_x, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("cascaded_group_attention", TORCH_BOX(&vitkernels::cascaded_group_attention));
  m.impl("cascaded_group_attention_backward", TORCH_BOX(&vitkernels::cascaded_group_attention_backward));
}
