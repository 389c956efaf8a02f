// The token ops' entry points: tensors to plain structs, outputs allocated, the kernel table of this CPU called.
#include "tokens/op.h"

#include "common/lengths.h"
#include "common/stable.h"
#include "tokens/kernels.h"

namespace vitkernels {
namespace {

const tokens::Kernels& kernels() {
  static const tokens::Kernels& table = []() -> const tokens::Kernels& { VITKERNELS_SELECT_KERNELS(tokens_kernels) }();
  return table;
}

// Rows whose channels are neighbours; copied where they are not.
Tensor rows_of(const Tensor& tensor) { return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor); }

// Python checks positions with full messages where it can read them; here they guard memory, also under torch.compile.
template <class P>
void check_positions(const Tensor& positions, P last, const char* name) {
  const P* values = static_cast<const P*>(positions.data_ptr());
  bool outside = false;
  for (int64_t t = 0; t < positions.size(0); ++t) outside |= values[t] < 0 || values[t] > last;
  STD_TORCH_CHECK(!outside, "vitkernels::factorized_position_embedding: ", name, " must lie within 0 and ", last);
}

tokens::Axis axis_of(const Tensor& positions, int64_t tokens, int64_t length, ScalarType accumulation, const char* name) {
  const bool fractional = positions.scalar_type() != ScalarType::Long;
  STD_TORCH_CHECK(
      positions.dim() == 1 && positions.size(0) == tokens && positions.is_contiguous() && (!fractional || positions.scalar_type() == accumulation),
      "vitkernels::factorized_position_embedding: ", name, " must be contiguous, one for each token, int64 or of the accumulation dtype");
  STD_TORCH_CHECK(length > 0 || tokens == 0, "vitkernels::factorized_position_embedding: the table of ", name, " has no entries");
  if (!fractional) {
    check_positions<int64_t>(positions, length - 1, name);
  } else if (accumulation == ScalarType::Double) {
    check_positions<double>(positions, 1.0, name);
  } else {
    check_positions<float>(positions, 1.0f, name);
  }
  return {length, positions.data_ptr(), fractional};
}

// Fills what both directions of the pooling need and checks it.
void fill(tokens::Pool& a, const Tensor& like, int64_t rows, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused, bool largest) {
  STD_TORCH_CHECK(cu_seqlens.numel() > 0, "vitkernels::masked_pool: cu_seqlens must have at least one element");
  a.dtype = dtype_of(like);
  a.rows = rows, a.dim = like.size(1), a.sequences = cu_seqlens.numel() - 1, a.largest = largest;
  a.cu = int32_values(cu_seqlens, a.sequences + 1, "masked_pool", "cu_seqlens");
  a.used = seqused ? int32_values(*seqused, a.sequences, "masked_pool", "seqused") : nullptr;
  check_cumulative(a.cu, a.sequences, rows, "masked_pool", "cu_seqlens");
  check_used(a.used, a.cu, a.sequences, "masked_pool", "seqused");
}

}  // namespace

Tensor factorized_position_embedding(
    const Tensor& x, const Tensor& height_table, const Tensor& width_table, const Tensor& rows, const Tensor& columns) {
  STD_TORCH_CHECK(
      x.dim() == 2 && height_table.dim() == 2 && width_table.dim() == 2 && height_table.size(1) == x.size(1) && width_table.size(1) == x.size(1),
      "vitkernels::factorized_position_embedding: x must be [T, D] and the tables [L, D]");
  check_same(height_table, x, "height_table");
  check_same(width_table, x, "width_table");
  const Tensor values = rows_of(x), heights = dense(height_table), widths = dense(width_table);
  tokens::PositionForward a{};
  a.dtype = dtype_of(x);
  a.tokens = x.size(0), a.dim = x.size(1);
  a.height = axis_of(rows, a.tokens, heights.size(0), accumulation_type(x), "rows");
  a.width = axis_of(columns, a.tokens, widths.size(0), accumulation_type(x), "columns");
  Tensor out = torch::stable::new_empty(x, {a.tokens, a.dim});
  a.x = values.data_ptr(), a.x_stride = values.stride(0);
  a.height_table = heights.data_ptr(), a.width_table = widths.data_ptr();
  a.out = out.data_ptr();
  kernels().position_forward(a);
  return out;
}

std::tuple<Tensor, Tensor> factorized_position_embedding_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& columns, int64_t height, int64_t width, bool need_height, bool need_width) {
  STD_TORCH_CHECK(grad_out.dim() == 2, "vitkernels::factorized_position_embedding_backward: grad_out must be [T, D]");
  const Tensor grad = rows_of(grad_out);
  tokens::PositionBackward a{};
  a.dtype = dtype_of(grad);
  a.tokens = grad.size(0), a.dim = grad.size(1);
  a.height = axis_of(rows, a.tokens, height, accumulation_type(grad), "rows");
  a.width = axis_of(columns, a.tokens, width, accumulation_type(grad), "columns");
  const auto table = [&](bool needed, int64_t length) {
    return needed ? torch::stable::new_empty(grad, {length, a.dim}) : torch::stable::new_empty(grad, {0});
  };
  Tensor grad_height = table(need_height, height), grad_width = table(need_width, width);
  a.grad_out = grad.data_ptr(), a.grad_stride = grad.stride(0);
  a.grad_height = need_height ? grad_height.data_ptr() : nullptr;
  a.grad_width = need_width ? grad_width.data_ptr() : nullptr;
  kernels().position_backward(a);
  return {grad_height, grad_width};
}

std::tuple<Tensor, Tensor> masked_pool(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused, bool largest) {
  STD_TORCH_CHECK(x.dim() == 2, "vitkernels::masked_pool: x must be [T, D]");
  const Tensor values = rows_of(x);
  tokens::PoolForward a{};
  fill(a, x, x.size(0), cu_seqlens, seqused, largest);
  Tensor out = torch::stable::new_empty(x, {a.sequences, a.dim});
  Tensor indices = largest ? torch::stable::new_empty(x, {a.sequences, a.dim}, ScalarType::Int) : torch::stable::new_empty(x, {0}, ScalarType::Int);
  a.x = values.data_ptr(), a.x_stride = values.stride(0);
  a.out = out.data_ptr();
  a.indices = largest ? static_cast<int32_t*>(indices.data_ptr()) : nullptr;
  kernels().pool_forward(a);
  return {out, indices};
}

Tensor masked_pool_backward(
    const Tensor& grad_out, const Tensor& indices, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused, int64_t rows, bool largest) {
  STD_TORCH_CHECK(grad_out.dim() == 2, "vitkernels::masked_pool_backward: grad_out must be [S, D]");
  const Tensor grad = dense(grad_out), where = dense(indices);
  tokens::PoolBackward a{};
  fill(a, grad, rows, cu_seqlens, seqused, largest);
  STD_TORCH_CHECK(
      grad.size(0) == a.sequences && (!largest || (where.scalar_type() == ScalarType::Int && where.numel() == grad.numel())),
      "vitkernels::masked_pool_backward: grad_out and indices must be [S, D]");
  for (int64_t i = 0; largest && i < where.numel(); ++i) {
    const int64_t s = i / a.dim, row = static_cast<const int32_t*>(where.data_ptr())[i] - a.begin(s);
    STD_TORCH_CHECK(a.count(s) == 0 || (row >= 0 && row < a.count(s)), "vitkernels::masked_pool_backward: indices must be the forward's");
  }
  Tensor grad_x = torch::stable::new_empty(grad, {rows, a.dim});
  a.grad_out = grad.data_ptr();
  a.indices = largest ? static_cast<const int32_t*>(where.data_ptr()) : nullptr;
  a.grad_x = grad_x.data_ptr();
  kernels().pool_backward(a);
  return grad_x;
}

}  // namespace vitkernels
