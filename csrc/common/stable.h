// What every op's entry point needs: tensors to plain structs, and the kernel table of this CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/map.h"

namespace vitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "vitkernels: the dtype must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A CPU tensor under these strides, uninitialised: one call of a shim, where new_empty and a view are two trips through the dispatcher.
inline Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A CPU tensor [B, C, H, W], uninitialised, in channels_last memory, [B, H, W, C], or contiguous.
inline Tensor empty_map(int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last, ScalarType dtype) {
  const int64_t pixels = height * width;
  if (channels_last) return empty_strided({batch, channels, height, width}, {pixels * channels, 1, width * channels, channels}, dtype);
  return empty_strided({batch, channels, height, width}, {channels * pixels, pixels, width, 1}, dtype);
}

// Whether a [B, C, H, W] tensor lies in memory as [B, H, W, C]; the stride of a dimension of size 1 says nothing.
inline bool channels_last(const Tensor& t) {
  const int64_t dense[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != dense[d]) return false;
  }
  return true;
}

// [B, H, N, width], in memory [B, N, H, width].
inline Tensor token_major(const Tensor& like, int64_t width) {
  // As a contiguous [B, N, H, width] has them, where a dimension of 0 counts as 1.
  const int64_t heads = like.size(1), tokens = like.size(2), row = std::max<int64_t>(heads, 1) * width;
  return empty_strided({like.size(0), heads, tokens, width}, {std::max<int64_t>(tokens, 1) * row, width, row, 1}, like.scalar_type());
}

inline Map map_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}; }

inline const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) { return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt; }

inline void check_same(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "vitkernels: ", name, " must have the dtype of the first argument");
}

}  // namespace vitkernels

#if defined(VITKERNELS_HAVE_AVX512_BF16)
#define VITKERNELS_CASE_AVX512_BF16(table) case ::vitkernels::isa::Isa::kAvx512Bf16: return avx512_bf16::table();
#else
#define VITKERNELS_CASE_AVX512_BF16(table)
#endif
#if defined(VITKERNELS_HAVE_AVX512)
#define VITKERNELS_CASE_AVX512(table) case ::vitkernels::isa::Isa::kAvx512: return avx512::table();
#else
#define VITKERNELS_CASE_AVX512(table)
#endif
#if defined(VITKERNELS_HAVE_AVX2)
#define VITKERNELS_CASE_AVX2(table) case ::vitkernels::isa::Isa::kAvx2: return avx2::table();
#else
#define VITKERNELS_CASE_AVX2(table)
#endif

// The body of a function that returns a family's kernel table for the instruction set in use.
#define VITKERNELS_SELECT_KERNELS(table)     \
  switch (::vitkernels::isa::selected()) {   \
    VITKERNELS_CASE_AVX512_BF16(table)       \
    VITKERNELS_CASE_AVX512(table)            \
    VITKERNELS_CASE_AVX2(table)              \
    default: return baseline::table();       \
  }
