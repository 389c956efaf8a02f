// What the entry points of packed, dense and patch attention share: one table of kernels serves them all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/stable.h"
#include "packed/kernels.h"

namespace vitkernels::packed {

inline const Kernels& kernels() {
  static const Kernels& table = []() -> const Kernels& { VITKERNELS_SELECT_KERNELS(packed_kernels) }();
  return table;
}

inline void set_dropout(Attention& a, double dropout_p, const std::optional<Tensor>& seed, const char* op) {
  a.dropout = dropout_p > 0;
  if (!a.dropout) return;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "vitkernels::", op, ": seed must be one int64");
  a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  a.drop_limit = static_cast<uint32_t>(std::clamp(std::nearbyint(dropout_p * 0x1p32), 1.0, 0x1p32) - 1.0);
  a.keep_factor = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
}

// Where sequences of one length begin, one after the other.
inline std::vector<int32_t> even_lengths(int64_t sequences, int64_t length) {
  STD_TORCH_CHECK(sequences * length <= INT32_MAX, "vitkernels: more than 2**31 tokens");
  std::vector<int32_t> cu(static_cast<size_t>(sequences) + 1);
  for (int64_t s = 0; s <= sequences; ++s) cu[s] = static_cast<int32_t>(s * length);
  return cu;
}

}  // namespace vitkernels::packed
