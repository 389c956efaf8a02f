// Entry points of MobileViT's attention: the pixels at one position in the patches of an image are a sequence of the packed kernels, found by their addresses.
#include "patch/op.h"

#include <vector>

#include "common/parallel.h"
#include "packed/entry.h"

namespace vitkernels {
namespace {

struct Patches {
  int64_t height, width, heads;
};

// [B, heads * D, H, W] of any strides as rows of heads.
Rows rows_of(const Tensor& t, const Patches& p) {
  return {t.data_ptr(),
          p.width * t.stride(3),
          t.size(1) / p.heads * t.stride(1),
          t.stride(1),
          t.stride(0),
          p.height * t.stride(2),
          t.stride(2),
          t.stride(3)};
}

struct Prepared {
  std::vector<int32_t> cu;
  packed::Schedule schedule;
};

void fill(packed::Attention& a, Prepared& p, const Tensor& q, const Tensor& k, const Tensor& v, const Patches& patches, double scale, bool split) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "vitkernels::patch_attention: q, k and v must be 4-dimensional");
  check_same(k, q, "k");
  check_same(v, q, "v");
  const auto agrees = [&](const Tensor& t, int64_t channels) { return t.size(0) == q.size(0) && t.size(1) == channels && t.size(2) == q.size(2) && t.size(3) == q.size(3); };
  STD_TORCH_CHECK(agrees(k, q.size(1)) && agrees(v, v.size(1)), "vitkernels::patch_attention: q and k must be [B, C, H, W], v [B, C_v, H, W]");
  STD_TORCH_CHECK(
      patches.height > 0 && patches.width > 0 && q.size(2) % patches.height == 0 && q.size(3) % patches.width == 0,
      "vitkernels::patch_attention: the patch must divide the map");
  STD_TORCH_CHECK(
      patches.heads > 0 && q.size(1) > 0 && v.size(1) > 0 && q.size(1) % patches.heads == 0 && v.size(1) % patches.heads == 0,
      "vitkernels::patch_attention: the heads must divide the channels");
  const int64_t tokens = q.size(2) / patches.height * (q.size(3) / patches.width);
  a.dtype = dtype_of(q);
  a.places = {false, patches.height, patches.width, q.size(3) / patches.width};
  a.sequences = q.size(0) * patches.height * patches.width;
  a.heads = a.kv_heads = patches.heads, a.dim = q.size(1) / patches.heads, a.value_dim = v.size(1) / patches.heads;
  a.total_q = a.total_k = a.sequences * tokens;
  p.cu = packed::even_lengths(a.sequences, tokens);
  a.cu_q = a.cu_k = p.cu.data();
  a.q = rows_of(q, patches), a.k = rows_of(k, patches), a.v = rows_of(v, patches);
  a.scale = scale;
  p.schedule = packed::make_schedule(a.cu_q, a.cu_k, nullptr, a.sequences, a.kv_heads, num_threads(), split);
  a.schedule = &p.schedule;
}

}  // namespace

std::tuple<Tensor, Tensor> patch_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t patch_height, int64_t patch_width, int64_t heads, double scale) {
  packed::Forward a{};
  Prepared p;
  const Patches patches{patch_height, patch_width, heads};
  fill(a, p, q, k, v, patches, scale, true);
  Tensor out = torch::stable::empty_like(v);
  Tensor lse = torch::stable::new_empty(q, {a.sequences, heads, a.sequences ? a.total_q / a.sequences : (q.size(2) / patch_height) * (q.size(3) / patch_width)}, ScalarType::Double);
  a.out = rows_of(out, patches), a.lse = lse.data_ptr();
  packed::kernels().forward(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> patch_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, int64_t patch_height, int64_t patch_width,
    int64_t heads, double scale, bool need_q, bool need_k, bool need_v) {
  packed::Backward a{};
  Prepared p;
  const Patches patches{patch_height, patch_width, heads};
  fill(a, p, q, k, v, patches, scale, false);
  check_same(grad_out, q, "grad_out");
  STD_TORCH_CHECK(
      grad_out.dim() == 4 && grad_out.numel() == v.numel() && grad_out.size(1) == v.size(1) && out.numel() == v.numel() && lse.numel() == a.heads * a.total_q &&
          lse.scalar_type() == ScalarType::Double,
      "vitkernels::patch_attention_backward: grad_out must have the shape of v, and lse must be the forward's");
  const Tensor saved_lse = dense(lse);
  a.grad_out = rows_of(grad_out, patches), a.lse = saved_lse.data_ptr();
  const auto grad = [&](bool needed, const Tensor& like, Rows& rows) {
    if (!needed) return torch::stable::new_empty(lse, {0});
    Tensor made = torch::stable::empty_like(like);
    rows = rows_of(made, patches);
    return made;
  };
  Tensor grad_q = grad(need_q, q, a.grad_q), grad_k = grad(need_k, k, a.grad_k), grad_v = grad(need_v, v, a.grad_v);
  packed::kernels().backward(a);
  return {grad_q, grad_k, grad_v};
}

}  // namespace vitkernels
