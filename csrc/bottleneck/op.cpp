// Entry point of the inverted bottleneck: tensors to a plain struct, the output allocated, the kernel table of this CPU called.
#include "bottleneck/op.h"

#include "bottleneck/kernels.h"
#include "bottleneck/sharing.h"
#include "common/scratch.h"

namespace vitkernels {
namespace bottleneck {

const Kernels& kernels() {
  static const Kernels& table = []() -> const Kernels& { VITKERNELS_SELECT_KERNELS(bottleneck_kernels) }();
  return table;
}

const void* checked_panels(const Tensor& weight, const Tensor& bias, int64_t depth, int64_t channels, ScalarType weights, ScalarType type, const char* name) {
  const int64_t panels = padded(channels) / kPanel;
  STD_TORCH_CHECK(
      weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == depth && weight.size(2) == bottleneck::kPanel && weight.is_contiguous() &&
          weight.scalar_type() == weights && bias.numel() == panels * bottleneck::kPanel && bias.is_contiguous() && bias.scalar_type() == type,
      "vitkernels: ", name, " must be contiguous panels [", panels, ", ", depth, ", ", bottleneck::kPanel,
      "] of the accumulation dtype, or all in bfloat16, with a bias of as many channels");
  return weight.data_ptr();
}

const void* checked_norm(const std::optional<Tensor>& tensor, int64_t channels, ScalarType type) {
  STD_TORCH_CHECK(
      !tensor || (tensor->numel() == channels && tensor->is_contiguous() && tensor->scalar_type() == type),
      "vitkernels: the norm's weight and bias must be contiguous, one number a channel of x, of the accumulation dtype");
  return data_of(tensor);
}

bool pairs_of(const Tensor& x, const Tensor& weight, int64_t in, int64_t hidden) {
  if (x.scalar_type() != ScalarType::BFloat16 || weight.scalar_type() != ScalarType::BFloat16) return false;
  STD_TORCH_CHECK(
      kernels().pairs && in % 2 == 0 && hidden % 2 == 0,
      "vitkernels: bfloat16 weights need bfloat16 products (avx512_bf16) and even numbers of channels, which are ", in, " and ", hidden);
  return true;
}

// The whole pass, its outputs shared out where that is better.
static void run(const Bottleneck& a) {
  const int64_t tokens = a.batch * a.height * a.width, arithmetic = bytes_of(a.dtype == Dtype::kFloat64 ? a.dtype : Dtype::kFloat32);
  const Bytes bytes{bytes_of(a.dtype), a.pairs ? 2 : arithmetic, arithmetic};
  const int64_t matrices = (a.expand_weight ? padded(a.hidden) * a.in : 0) + padded(a.out) * a.hidden;
  const int64_t narrowest = a.expand_weight ? std::min(a.hidden, a.out) : a.out;
  if (a.depthwise_weight || a.norm == Norm::kSample || !shares_outputs(tokens, narrowest, matrices * bytes.matrices, bytes)) return kernels().forward(a);
  Bottleneck flat = a;
  flat.batch = flat.height = flat.out_height = 1;
  const auto *x = static_cast<const char*>(a.x), *residual = static_cast<const char*>(a.residual);
  auto* const y = static_cast<char*>(a.y);
  if (!a.expand_weight) return run_by_outputs(flat, tokens, bytes, x, y, residual);
  const int64_t row = hidden_row(a.hidden, bytes.tokens);
  const Buffer<char> hidden(tokens * row * bytes.tokens);
  run_by_outputs(expansion_of(flat, row), tokens, bytes, x, hidden);
  run_by_outputs(reduction_of(flat, row), tokens, bytes, hidden, y, residual);
}

}  // namespace bottleneck

using bottleneck::checked_norm, bottleneck::checked_panels;

Tensor inverted_bottleneck(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const std::optional<Tensor>& depthwise_weight, const std::optional<Tensor>& depthwise_bias,
    const Tensor& project_weight, const Tensor& project_bias, const std::optional<Tensor>& residual, int64_t out_channels, int64_t norm, double eps, int64_t kernel,
    int64_t stride, int64_t padding, int64_t activation, int64_t out_activation) {
  STD_TORCH_CHECK(x.dim() == 4 && channels_last(x), "vitkernels::inverted_bottleneck: x must be [B, C, H, W] in channels_last memory");
  STD_TORCH_CHECK(
      norm >= 0 && norm <= 2 && activation >= 0 && activation <= bottleneck::kLastActivation && out_activation >= 0 && out_activation <= bottleneck::kLastActivation,
      "vitkernels::inverted_bottleneck: there is no such norm or activation");
  const ScalarType type = accumulation_type(x);
  bottleneck::Bottleneck a{};
  a.dtype = dtype_of(x);
  a.batch = x.size(0), a.in = x.size(1), a.height = x.size(2), a.width = x.size(3);
  STD_TORCH_CHECK(project_weight.dim() == 3, "vitkernels::inverted_bottleneck: project_weight must be panels [panels, hidden, ", bottleneck::kPanel, "]");
  a.hidden = project_weight.size(1), a.out = out_channels;
  a.x_row = a.in, a.y_row = a.out;
  a.pairs = bottleneck::pairs_of(x, project_weight, a.in, a.hidden);
  STD_TORCH_CHECK(!a.pairs || !depthwise_weight, "vitkernels::inverted_bottleneck: with a depthwise convolution the weights must not be bfloat16");
  const ScalarType weights = a.pairs ? ScalarType::BFloat16 : type;
  a.x = x.data_ptr();
  a.norm = static_cast<bottleneck::Norm>(norm), a.eps = eps;
  a.norm_weight = checked_norm(norm_weight, a.in, type), a.norm_bias = checked_norm(norm_bias, a.in, type);
  STD_TORCH_CHECK(expand_weight.has_value() == expand_bias.has_value(), "vitkernels::inverted_bottleneck: an expansion needs a weight and a bias");
  if (expand_weight) {
    a.expand_weight = checked_panels(*expand_weight, *expand_bias, a.in, a.hidden, weights, type, "expand_weight"), a.expand_bias = expand_bias->data_ptr();
  } else {
    STD_TORCH_CHECK(a.hidden == a.in, "vitkernels::inverted_bottleneck: without an expansion project_weight must take the ", a.in, " channels of x");
  }
  a.out_height = a.height, a.out_width = a.width;
  STD_TORCH_CHECK(depthwise_weight.has_value() == depthwise_bias.has_value(), "vitkernels::inverted_bottleneck: a depthwise convolution needs a weight and a bias");
  if (depthwise_weight) {
    const int64_t padded = bottleneck::padded(a.hidden);
    STD_TORCH_CHECK(
        kernel > 0 && stride > 0 && padding >= 0 && padding < kernel && a.height + 2 * padding >= kernel && a.width + 2 * padding >= kernel &&
            depthwise_weight->numel() == kernel * kernel * padded && depthwise_weight->is_contiguous() && depthwise_weight->scalar_type() == type &&
            depthwise_bias->numel() == padded && depthwise_bias->is_contiguous() && depthwise_bias->scalar_type() == type,
        "vitkernels::inverted_bottleneck: depthwise_weight must be contiguous [kernel * kernel, ", padded,
        "] of the accumulation dtype with a bias, its padding less than its kernel, and that at most the padded map");
    a.kernel = kernel, a.stride = stride, a.padding = padding;
    a.out_height = (a.height + 2 * padding - kernel) / stride + 1, a.out_width = (a.width + 2 * padding - kernel) / stride + 1;
    a.depthwise_weight = depthwise_weight->data_ptr(), a.depthwise_bias = depthwise_bias->data_ptr();
  }
  a.project_weight = checked_panels(project_weight, project_bias, a.hidden, a.out, weights, type, "project_weight"), a.project_bias = project_bias.data_ptr();
  a.activation = static_cast<bottleneck::Activation>(activation), a.out_activation = static_cast<bottleneck::Activation>(out_activation);
  if (residual) {
    check_same(*residual, x, "residual");
    STD_TORCH_CHECK(
        residual->dim() == 4 && residual->size(0) == a.batch && residual->size(1) == a.out && residual->size(2) == a.out_height &&
            residual->size(3) == a.out_width && channels_last(*residual),
        "vitkernels::inverted_bottleneck: residual must have the shape of the result, in channels_last memory");
    a.residual = residual->data_ptr();
  }
  Tensor y = empty_map(a.batch, a.out, a.out_height, a.out_width, true, x.scalar_type());
  a.y = y.data_ptr();
  bottleneck::run(a);
  return y;
}

}  // namespace vitkernels
