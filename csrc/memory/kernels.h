// The kernels of attention with memory, one table per instruction set. Plain structs of pointers: no PyTorch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/map.h"

namespace vitkernels::memory {

// Query i of a sample sees the sample's keys, the memory of its group (the queries are so many groups of equal size, in order) and, where there are
// own keys, own key i.
struct Attention {
  Dtype dtype;
  int64_t batch, heads, queries, keys, dim, value_dim;
  Map q, k, v;                  // [B, H, queries or keys, D or D_v]
  Map own_k, own_v;             // [B, H, queries, D or D_v]; data null: none
  Rows memory_k, memory_v;      // [M, H, D or D_v], the groups' one after the other
  int64_t groups;
  const int64_t* memory_begin;  // [groups + 1]
  double scale;
  bool dropout;
  uint64_t seed;
  uint32_t drop_limit;  // a weight is dropped where its 32 random bits are at most this
  double keep_factor;   // of the weights that are kept

  int64_t memories() const { return memory_begin[groups]; }
  int64_t group_rows() const { return queries / groups; }
};

struct Forward : Attention {
  void* out;    // contiguous [B, queries, H, D_v]
  double* lse;  // contiguous [B, H, queries]
};

// Gradients are contiguous, of the shapes above, or null where they are not wanted.
struct Backward : Attention {
  Map grad_out;            // [B, H, queries, D_v]; data null: zero
  const double* grad_lse;  // contiguous; null: zero
  const double* lse;
  void *grad_q, *grad_k, *grad_v, *grad_own_k, *grad_own_v, *grad_memory_k, *grad_memory_v;
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

}  // namespace vitkernels::memory

// Each instruction set's table, defined by memory/cpu.cpp compiled for it.
namespace vitkernels::baseline { const memory::Kernels& memory_kernels(); }
namespace vitkernels::avx2 { const memory::Kernels& memory_kernels(); }
namespace vitkernels::avx512 { const memory::Kernels& memory_kernels(); }
namespace vitkernels::avx512_bf16 { const memory::Kernels& memory_kernels(); }
