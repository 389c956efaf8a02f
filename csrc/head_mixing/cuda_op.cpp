// Re-Attention's forward on a GPU: tensors to plain structs, the kernels launched on the current stream. No call waits for the GPU.
#include <torch/csrc/stable/library.h>

#include "common/cuda_device.h"
#include "common/stable.h"
#include "head_mixing/cuda_kernels.h"

namespace vitkernels {
namespace {

using head_mixing::cuda::Arguments;
using head_mixing::cuda::Folded;
using head_mixing::cuda::kLog2E;
using head_mixing::cuda::kMaxDim;
using head_mixing::cuda::kMaxHeads;
using head_mixing::cuda::Launch;
using head_mixing::cuda::Norm;
using head_mixing::cuda::Rows;

constexpr const char* kOp = "vitkernels::re_attention_rows";

// Shapes are checked in Python with full messages; these guard direct callers of torch.ops from reading out of bounds.
Rows rows_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, kOp, ": ", name, " must be 4-dimensional");
  bool whole = tensor.size(3) % 8 == 0 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(3) == 1;
  for (int64_t i = 0; i < 3; ++i) whole = whole && tensor.stride(i) % 8 == 0;
  STD_TORCH_CHECK(whole, kOp, ": ", name, " must have dense rows of a multiple of 8 elements, each aligned to 16 bytes");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), static_cast<int>(tensor.size(3))};
}

void check_place(const Tensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(tensor.get_device_index() == q.get_device_index(), kOp, ": ", name, " must be on the device of q");
}

const double* small(const std::optional<Tensor>& tensor, const Tensor& q, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  check_place(*tensor, q, name);
  STD_TORCH_CHECK(
      tensor->scalar_type() == ScalarType::Double && tensor->is_contiguous() && tensor->numel() == count, kOp, ": ", name, " must be dense, float64, of ",
      count, " elements; it has ", tensor->numel());
  return static_cast<const double*>(tensor->data_ptr());
}

template <class F>
void with_launch(const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return f(Launch<BFloat16>{});
    case ScalarType::Half: return f(Launch<Float16>{});
    default: STD_TORCH_CHECK(false, kOp, ": the dtype must be bfloat16 or float16 on a GPU");
  }
}

// The output, [B, N, H, value_dim], and the logsumexp of every row: `known`, or computed here.
std::tuple<Tensor, Tensor> re_attention_rows(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& known, const Tensor& mix, const std::optional<Tensor>& bias,
    int64_t norm, const std::optional<Tensor>& weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var, double eps, double scale, int64_t value_dim) {
  Arguments args{};
  args.q = rows_of(q, "q"), args.k = rows_of(k, "k"), args.v = rows_of(v, "v");
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxHeads, kOp, ": the CUDA kernels have 1 to ", kMaxHeads, " heads; there are ", heads);
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, kOp, ": the CUDA kernels have heads of 1 to ", kMaxDim, " columns; q has ", dim);
  STD_TORCH_CHECK(tokens < (1 << 30) && value_dim >= 1 && value_dim <= v.size(3), kOp, ": v must have at least value_dim columns");
  for (const auto* other : {&k, &v}) {
    check_same(*other, q, "k and v");
    check_place(*other, q, "k and v");
    STD_TORCH_CHECK(other->size(0) == batch && other->size(1) == heads && other->size(2) == tokens, kOp, ": k and v must have q's B, H and N");
  }
  STD_TORCH_CHECK(k.size(3) == dim, kOp, ": k must have q's columns");
  STD_TORCH_CHECK(norm >= 0 && norm <= 2 && (norm != 1 || (mean && var)), kOp, ": norm must be 0, 1 (with mean and var) or 2");
  args.batch = batch, args.heads = static_cast<int>(heads), args.tokens = static_cast<int>(tokens), args.value_dim = static_cast<int>(value_dim);
  args.scale_log2 = static_cast<float>(scale * kLog2E);
  args.small.mix = small(mix, q, heads * heads, "mix"), args.small.bias = small(bias, q, heads, "bias");
  args.small.weight = small(weight, q, heads, "weight"), args.small.norm_bias = small(norm_bias, q, heads, "norm_bias");
  args.small.mean = small(mean, q, heads, "mean"), args.small.var = small(var, q, heads, "var");
  args.small.norm = static_cast<Norm>(norm), args.small.eps = eps;
  const cuda::Device device(q);
  Tensor out = torch::stable::new_empty(q, {batch, tokens, heads, value_dim});
  Tensor lse = known ? *known : torch::stable::new_empty(q, {batch, heads, tokens}, ScalarType::Double);
  args.lse = const_cast<double*>(small(lse, q, batch * heads * tokens, "lse"));
  args.out = out.data_ptr();
  if (out.numel() == 0) return {out, lse};
  const Tensor folded = torch::stable::new_empty(q, {static_cast<int64_t>(sizeof(Folded))}, ScalarType::Byte);
  args.folded = static_cast<Folded*>(folded.data_ptr());
  args.lse_is_known = known.has_value();
  with_launch(q, [&](auto launch) {
    STD_CUDA_CHECK(launch.lse(args, device.stream));
    STD_CUDA_CHECK(launch.rows(args, device.multiprocessors, device.shared_limit, device.stream));
  });
  return {out, lse};
}

// The logsumexp alone, for statistics that come before the rows.
Tensor re_attention_lse(const Tensor& q, const Tensor& k, double scale) {
  Arguments args{};
  args.q = rows_of(q, "q"), args.k = rows_of(k, "k");
  check_same(k, q, "k");
  check_place(k, q, "k");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == q.size(i), kOp, ": k must have the shape of q");
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxDim && q.size(2) < (1 << 30), kOp, ": the CUDA kernels have heads of 1 to ", kMaxDim, " columns");
  args.batch = q.size(0), args.heads = static_cast<int>(q.size(1)), args.tokens = static_cast<int>(q.size(2));
  args.scale_log2 = static_cast<float>(scale * kLog2E);
  const cuda::Device device(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Double);
  args.lse = static_cast<double*>(lse.data_ptr());
  if (lse.numel() > 0) with_launch(q, [&](auto launch) { STD_CUDA_CHECK(launch.lse(args, device.stream)); });
  return lse;
}

// Bytes of shared memory without which the rows cannot be computed.
int64_t re_attention_shared_memory(int64_t heads, int64_t dim, int64_t value_dim) {
  return head_mixing::cuda::least_shared(static_cast<int>(heads), static_cast<int>(dim), static_cast<int>(value_dim));
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CompositeExplicitAutograd, m) {
  m.impl("re_attention_shared_memory", TORCH_BOX(&vitkernels::re_attention_shared_memory));
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  m.impl("re_attention_rows", TORCH_BOX(&vitkernels::re_attention_rows));
  m.impl("re_attention_lse", TORCH_BOX(&vitkernels::re_attention_lse));
}
