#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <utility>

namespace vitkernels {

namespace {
thread_local bool inside = false;  // of a body that parallel_for spread out

struct Inside {
  const bool before = std::exchange(inside, true);
  ~Inside() { inside = before; }
};
}  // namespace

int64_t num_threads() { return inside ? 1 : torch::stable::get_num_threads(); }

void parallel_for(int64_t n, void (*body)(void* context, int64_t i), void* context) {
  if (n <= 1) {
    if (n == 1) body(context, 0);
    return;
  }
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const Inside here;
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace vitkernels
