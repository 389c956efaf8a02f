#include "bottleneck/sharing.h"

#include <utility>

#include "bottleneck/op.h"

namespace vitkernels::bottleneck {

void run_pass(Bottleneck a, int64_t first, int64_t count, int64_t bytes, const char* x, char* y, const char* residual) {
  a.width = a.out_width = count;
  a.x = x + first * a.x_row * bytes, a.y = y + first * a.y_row * bytes;
  a.residual = residual ? residual + first * a.y_row * bytes : nullptr;
  kernels().forward(a);
}

Bottleneck expansion_of(Bottleneck mlp, int64_t row) {
  mlp.out = mlp.hidden, mlp.hidden = mlp.in, mlp.y_row = row;
  mlp.project_weight = std::exchange(mlp.expand_weight, nullptr), mlp.project_bias = std::exchange(mlp.expand_bias, nullptr);
  mlp.out_activation = std::exchange(mlp.activation, Activation::kNone);
  return mlp;
}

Bottleneck reduction_of(Bottleneck mlp, int64_t row) {
  mlp.in = mlp.hidden, mlp.x_row = row;
  mlp.norm = Norm::kNone, mlp.norm_weight = mlp.norm_bias = nullptr;
  mlp.expand_weight = mlp.expand_bias = nullptr, mlp.activation = Activation::kNone;
  return mlp;
}

int64_t hidden_row(int64_t hidden, int64_t bytes) {
  const int64_t line = 64 / bytes;
  return ((hidden + line - 1) / line | 1) * line;
}

bool shares_outputs(int64_t tokens, int64_t narrowest, int64_t matrices, Bytes bytes) {
  constexpr int64_t kTokens = 32, kRows = 8, kWorth = int64_t{1} << 20;  // a thread's, those of a tile, bytes of matrices
  const auto per = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t threads = num_threads(), tiles = per(tokens, kRows), panels = padded(narrowest) / kPanel;
  return threads > 1 && bytes.tokens == bytes.matrices && tokens <= kTokens * threads && matrices >= kWorth &&
         tiles * per(panels, threads) <= per(tiles, threads) * panels;  // the threads are as evenly loaded
}

Bottleneck columns_of(Bottleneck a, int64_t first, int64_t count, Bytes bytes) {
  a.out = count;
  a.project_weight = static_cast<const char*>(a.project_weight) + first * a.hidden * bytes.matrices;
  a.project_bias = static_cast<const char*>(a.project_bias) + first * bytes.vectors;
  return a;
}

void run_by_outputs(const Bottleneck& a, int64_t tokens, Bytes bytes, const char* x, char* y, const char* residual) {
  for_shares(padded(a.out) / kPanel, 1, [&](int64_t panel, int64_t panels) {
    const int64_t first = panel * kPanel;
    const Bottleneck own = columns_of(a, first, std::min(panels * kPanel, a.out - first), bytes);
    run_pass(own, 0, tokens, bytes.tokens, x, y + first * bytes.tokens, residual ? residual + first * bytes.tokens : nullptr);
  });
}

}  // namespace vitkernels::bottleneck
