// Patches of an image are tokens of a bottleneck's projection: gathered a tile at a time, they never lie in memory side by side.
#include "patch_embedding/op.h"

#include "bottleneck/kernels.h"
#include "bottleneck/op.h"

namespace vitkernels {

using bottleneck::checked_norm, bottleneck::checked_panels;

Tensor patch_embedding(
    const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& weight, const Tensor& bias,
    int64_t out_channels, int64_t patch_height, int64_t patch_width, bool norm, double eps) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(1) > 0 && patch_height > 0 && patch_width > 0,
      "vitkernels::patch_embedding: x must be [B, C, H, W] with channels, and the patch have pixels");
  const ScalarType type = accumulation_type(x);
  const bottleneck::Patches patches{map_of(x), x.size(1), patch_height, patch_width};
  bottleneck::Bottleneck a{};
  a.dtype = dtype_of(x);
  a.patches = &patches;
  a.batch = x.size(0), a.height = a.out_height = x.size(2) / patch_height, a.width = a.out_width = x.size(3) / patch_width;
  a.in = a.hidden = a.x_row = patches.channels * patch_height * patch_width, a.out = a.y_row = out_channels;
  a.norm = norm ? bottleneck::Norm::kToken : bottleneck::Norm::kNone, a.eps = eps;
  a.norm_weight = checked_norm(norm_weight, a.in, type), a.norm_bias = checked_norm(norm_bias, a.in, type);
  a.pairs = bottleneck::pairs_of(x, weight, a.in, a.hidden);
  a.project_weight = checked_panels(weight, bias, a.in, a.out, a.pairs ? ScalarType::BFloat16 : type, type, "weight"), a.project_bias = bias.data_ptr();
  Tensor y = empty_map(a.batch, a.out, a.height, a.width, true, x.scalar_type());
  a.y = y.data_ptr();
  bottleneck::kernels().forward(a);
  return y;
}

}  // namespace vitkernels
