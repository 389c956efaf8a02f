#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace vitkernels {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t n, void (*body)(void* context, int64_t i), void* context) {
  if (n <= 1) {
    if (n == 1) body(context, 0);
    return;
  }
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace vitkernels
