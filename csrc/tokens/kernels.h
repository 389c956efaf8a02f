// The token family's kernels, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vitkernels::tokens {

// A table of embeddings of one axis and where along that axis each token lies.
struct Axis {
  int64_t length;         // entries of the table
  const void* positions;  // int64 indices; fractional: shares of the way from the first entry to the last, in the accumulation type
  bool fractional;
};

struct PositionForward {
  Dtype dtype;
  int64_t tokens, dim;
  const void* x;  // rows of neighbouring channels, x_stride apart
  int64_t x_stride;
  Axis height, width;
  const void *height_table, *width_table;  // contiguous [length, dim]
  void* out;                               // contiguous [tokens, dim]
};

struct PositionBackward {
  Dtype dtype;
  int64_t tokens, dim;
  const void* grad_out;  // as x above
  int64_t grad_stride;
  Axis height, width;
  void *grad_height, *grad_width;  // contiguous [length, dim], null: not wanted
};

// Sequence s holds the rows from cu[s] on, used[s] of them (used null: up to cu[s + 1]).
struct Pool {
  Dtype dtype;
  int64_t rows, dim, sequences;
  const int32_t *cu, *used;
  bool largest;  // the maximum; else the mean

  int64_t begin(int64_t s) const { return cu[s]; }
  int64_t count(int64_t s) const { return used ? used[s] : cu[s + 1] - cu[s]; }
};

struct PoolForward : Pool {
  const void* x;  // rows of neighbouring channels, x_stride apart
  int64_t x_stride;
  void* out;         // contiguous [sequences, dim]
  int32_t* indices;  // [sequences, dim]: the row of each maximum, -1 where there is none; null for the mean
};

struct PoolBackward : Pool {
  const void* grad_out;  // contiguous [sequences, dim]
  const int32_t* indices;
  void* grad_x;  // contiguous [rows, dim]
};

struct Kernels {
  void (*position_forward)(const PositionForward&);
  void (*position_backward)(const PositionBackward&);
  void (*pool_forward)(const PoolForward&);
  void (*pool_backward)(const PoolBackward&);
};

}  // namespace vitkernels::tokens

// Each instruction set's table, defined by tokens/cpu.cpp compiled for it.
namespace vitkernels::baseline { const tokens::Kernels& tokens_kernels(); }
namespace vitkernels::avx2 { const tokens::Kernels& tokens_kernels(); }
namespace vitkernels::avx512 { const tokens::Kernels& tokens_kernels(); }
namespace vitkernels::avx512_bf16 { const tokens::Kernels& tokens_kernels(); }
