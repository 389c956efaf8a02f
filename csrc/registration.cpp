// Every native CPU op's implementation is registered here, on one page. The schemas are defined in Python (vitkernels/ops/<family>/op.py).
#include <torch/csrc/stable/library.h>

#include <string>

#include "batch_norm/op.h"
#include "blocks/op.h"
#include "bottleneck/op.h"
#include "cascaded_group/op.h"
#include "chain/op.h"
#include "common/isa.h"
#include "dense/op.h"
#include "head_mixing/op.h"
#include "matching/op.h"
#include "memory/op.h"
#include "packed/op.h"
#include "patch/op.h"
#include "patch_embedding/op.h"
#include "separable/op.h"
#include "tokens/op.h"

namespace vitkernels {
namespace {

// The instruction set in use; raises what VITKERNELS_CPU_ISA asked for and cannot have.
std::string cpu_isa() {
  const isa::Isa selected = isa::selected();
  STD_TORCH_CHECK(!isa::selection_error(), isa::selection_error());
  return isa::name(selected);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_FRAGMENT(vitkernels, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&vitkernels::cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&vitkernels::attention));
  m.impl("attention_backward", TORCH_BOX(&vitkernels::attention_backward));
  m.impl("batch_norm_act", TORCH_BOX(&vitkernels::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&vitkernels::batch_norm_act_backward));
  m.impl("cascaded_group_attention", TORCH_BOX(&vitkernels::cascaded_group_attention));
  m.impl("cascaded_group_attention_backward", TORCH_BOX(&vitkernels::cascaded_group_attention_backward));
  m.impl("cascaded_group_attention_batch_norm", TORCH_BOX(&vitkernels::cascaded_group_attention_batch_norm));
  m.impl("cascaded_group_attention_batch_norm_backward", TORCH_BOX(&vitkernels::cascaded_group_attention_batch_norm_backward));
  m.impl("detection_set_loss", TORCH_BOX(&vitkernels::detection_set_loss));
  m.impl("detection_set_loss_backward", TORCH_BOX(&vitkernels::detection_set_loss_backward));
  m.impl("factorized_position_embedding", TORCH_BOX(&vitkernels::factorized_position_embedding));
  m.impl("factorized_position_embedding_backward", TORCH_BOX(&vitkernels::factorized_position_embedding_backward));
  m.impl("inverted_bottleneck", TORCH_BOX(&vitkernels::inverted_bottleneck));
  m.impl("layer_chain", TORCH_BOX(&vitkernels::layer_chain));
  m.impl("masked_pool", TORCH_BOX(&vitkernels::masked_pool));
  m.impl("masked_pool_backward", TORCH_BOX(&vitkernels::masked_pool_backward));
  m.impl("memory_attention", TORCH_BOX(&vitkernels::memory_attention));
  m.impl("memory_attention_backward", TORCH_BOX(&vitkernels::memory_attention_backward));
  m.impl("pairwise_box_cost", TORCH_BOX(&vitkernels::pairwise_box_cost));
  m.impl("patch_attention", TORCH_BOX(&vitkernels::patch_attention));
  m.impl("patch_attention_backward", TORCH_BOX(&vitkernels::patch_attention_backward));
  m.impl("patch_embedding", TORCH_BOX(&vitkernels::patch_embedding));
  m.impl("re_attention", TORCH_BOX(&vitkernels::re_attention));
  m.impl("re_attention_backward", TORCH_BOX(&vitkernels::re_attention_backward));
  m.impl("separable_attention", TORCH_BOX(&vitkernels::separable_attention));
  m.impl("separable_attention_backward", TORCH_BOX(&vitkernels::separable_attention_backward));
  m.impl("separable_layer", TORCH_BOX(&vitkernels::separable_layer));
  m.impl("separable_self_attention", TORCH_BOX(&vitkernels::separable_self_attention));
  m.impl("separable_self_attention_backward", TORCH_BOX(&vitkernels::separable_self_attention_backward));
  m.impl("transformer_blocks", TORCH_BOX(&vitkernels::transformer_blocks));
  m.impl("varlen_attention", TORCH_BOX(&vitkernels::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&vitkernels::varlen_attention_backward));
}
