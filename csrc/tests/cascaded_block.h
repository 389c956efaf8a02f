// Cascaded group attention as plain loops, and the CUDA kernels' blocks run on the CPU: what test_cascaded_block.cpp compares.
#pragma once

#include <array>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "cascaded_group/cuda_backward.h"
#include "check.h"

namespace vitkernels::test {

using namespace vitkernels::cascaded_group::cuda;

// Sizes, in the order in which test cases are written.
struct Case {
  int batch, height, width, heads, split, value_dim, key_dim, window;
  std::vector<int> kernel_sizes;
  bool channels_last = false;
  bool biases = true;

  Shape shape() const {
    Shape s{batch, height, width, heads, split, value_dim, key_dim, window, {}};
    for (int i = 0; i < heads; ++i) s.kernel_sizes[i] = kernel_sizes[i];
    return s;
  }
};

// Every argument and the cotangent as doubles that are exact in T; x and grad_y are [B, C, H, W], dense.
struct Values {
  std::vector<double> x, qkv, qkv_bias, dw, dw_bias, table, proj, proj_bias, grad_y;
};

// Every result, in the same order as the schema's.
struct Results {
  std::vector<double> y, grad_x, qkv, qkv_bias, dw, dw_bias, table, proj, proj_bias;
  double smallest_output = INFINITY;  // of all heads, in magnitude; set by defined()
};
inline auto named(const Results& r) {
  return std::array<std::pair<const char*, const std::vector<double>*>, 9>{
      {{"y", &r.y},
       {"grad_x", &r.grad_x},
       {"grad_qkv_weight", &r.qkv},
       {"grad_qkv_bias", &r.qkv_bias},
       {"grad_dw_weight", &r.dw},
       {"grad_dw_bias", &r.dw_bias},
       {"grad_attention_bias", &r.table},
       {"grad_proj_weight", &r.proj},
       {"grad_proj_bias", &r.proj_bias}}};
}

template <class T>
double rounded(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(from_float<T>(static_cast<float>(value)));
  }
}

template <class T>
Values random_values(const Case& c, unsigned long long seed) {
  const Shape s = c.shape();
  Random random(seed);
  const auto draw = [&](int64_t count, double scale) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = rounded<T>(scale * random.next());
    return values;
  };
  const int64_t map = s.batch * s.channels() * s.height * s.width;
  Values v;
  v.x = draw(map, 1.7);
  v.qkv = draw(int64_t{s.heads} * s.qkv_rows() * s.split, 1.7 / std::sqrt(s.split));
  v.dw = draw(dw_offset(s, s.heads), 0.5);
  v.table = draw(int64_t{s.heads} * s.tokens(), 1);
  v.proj = draw(int64_t{s.channels()} * s.heads * s.value_dim, 1.7 / std::sqrt(s.heads * s.value_dim));
  v.qkv_bias = draw(c.biases ? s.heads * s.qkv_rows() : 0, 0.5);
  v.dw_bias = draw(c.biases ? s.heads * s.key_dim : 0, 0.5);
  v.proj_bias = draw(c.biases ? s.channels() : 0, 0.5);
  v.grad_y = draw(map, 1.7);
  if (c.biases) {
    // A gradient jumps where ReLU's argument changes its sign, and then rounding alone can make all the difference: keep the heads' outputs near 1 or
    // -1.
    for (int64_t row = 0; row < int64_t{s.heads} * s.qkv_rows(); ++row) {
      if (row % s.qkv_rows() < 2 * s.key_dim) continue;
      v.qkv_bias[row] = random.next() < 0 ? -1 : 1;
      for (int j = 0; j < s.split; ++j) v.qkv[row * s.split + j] = rounded<T>(0.15 * v.qkv[row * s.split + j]);
    }
  }
  return v;
}

// The definition, window by window in loops: sums in Sum, each operation's result rounded to T, as eager PyTorch would. <double, double> is the
// truth.
template <class T, class Sum>
Results defined(const Case& c, const Values& v, double scale) {
  const Shape s = c.shape();
  const int w = s.window, n = s.tokens(), channels = s.channels(), d = s.value_dim, e = s.key_dim, rows = s.qkv_rows();
  const auto round = [](Sum value) { return static_cast<Sum>(rounded<T>(static_cast<double>(value))); };
  const auto bias_of = [&](const std::vector<double>& bias, int64_t i) { return bias.empty() ? Sum(0) : static_cast<Sum>(bias[i]); };
  using Array = std::vector<Sum>;
  Array qkv_sum(v.qkv.size()), qkv_bias_sum(s.heads * rows), dw_sum(v.dw.size()), dw_bias_sum(s.heads * e), table_sum(v.table.size()),
      proj_sum(v.proj.size()), proj_bias_sum(channels);
  Results r;
  r.y.assign(v.x.size(), NAN);
  r.grad_x.assign(v.x.size(), NAN);
  const int down = (s.height + w - 1) / w, across = (s.width + w - 1) / w;
  for (int64_t window = 0; window < s.batch * down * across; ++window) {
    const int64_t image = window / (down * across);
    const int top = static_cast<int>(window / across % down) * w, left = static_cast<int>(window % across) * w;
    const auto index = [&](int token, int channel) {
      const int row = top + token / w, column = left + token % w;
      return row < s.height && column < s.width ? ((image * channels + channel) * s.height + row) * s.width + column : -1;
    };
    const auto gather = [&](const std::vector<double>& map) {
      Array values(static_cast<size_t>(n) * channels);
      for (int t = 0; t < n; ++t) {
        for (int ch = 0; ch < channels; ++ch) values[t * channels + ch] = index(t, ch) < 0 ? 0 : static_cast<Sum>(map[index(t, ch)]);
      }
      return values;
    };
    const Array x = gather(v.x), grad_y = gather(v.grad_y);
    struct PerHead {
      Array input, y, q, weights, output;
    };
    std::vector<PerHead> heads(s.heads);
    for (int h = 0; h < s.heads; ++h) {
      PerHead& head = heads[h];
      head.input.resize(n * s.split), head.y.resize(n * rows), head.q.resize(n * e), head.weights.resize(n * n), head.output.resize(n * d);
      for (int t = 0; t < n; ++t) {
        for (int j = 0; j < s.split; ++j) {
          const Sum split = x[t * channels + h * s.split + j];
          head.input[t * s.split + j] = h == 0 ? split : round(split + heads[h - 1].output[t * d + j]);
        }
        for (int row = 0; row < rows; ++row) {
          Sum sum = 0;
          for (int j = 0; j < s.split; ++j) sum += static_cast<Sum>(v.qkv[(int64_t{h} * rows + row) * s.split + j]) * head.input[t * s.split + j];
          head.y[t * rows + row] = round(sum + bias_of(v.qkv_bias, h * rows + row));
        }
      }
      const int size = s.kernel_sizes[h];
      for (int t = 0; t < n; ++t) {
        for (int ch = 0; ch < e; ++ch) {
          Sum sum = 0;
          for (int ky = 0; ky < size; ++ky) {
            for (int kx = 0; kx < size; ++kx) {
              const int row = t / w + ky - size / 2, column = t % w + kx - size / 2;
              if (row < 0 || row >= w || column < 0 || column >= w) continue;
              sum += static_cast<Sum>(v.dw[dw_offset(s, h) + (ch * size + ky) * size + kx]) * head.y[(row * w + column) * rows + ch];
            }
          }
          head.q[t * e + ch] = round(sum + bias_of(v.dw_bias, h * e + ch));
        }
      }
      for (int i = 0; i < n; ++i) {
        Array scores(n);
        Sum top_score = -INFINITY, total = 0;
        for (int j = 0; j < n; ++j) {
          Sum sum = 0;
          for (int ch = 0; ch < e; ++ch) sum += round(head.q[i * e + ch] * static_cast<Sum>(scale)) * head.y[j * rows + e + ch];
          scores[j] = round(round(sum) + static_cast<Sum>(v.table[h * n + std::abs(i / w - j / w) * w + std::abs(i % w - j % w)]));
          top_score = std::fmax(top_score, scores[j]);
        }
        for (int j = 0; j < n; ++j) total += scores[j] = std::exp(scores[j] - top_score);
        for (int j = 0; j < n; ++j) head.weights[i * n + j] = round(scores[j] / total);
        for (int ch = 0; ch < d; ++ch) {
          Sum sum = 0;
          for (int j = 0; j < n; ++j) sum += head.weights[i * n + j] * head.y[j * rows + 2 * e + ch];
          head.output[i * d + ch] = round(sum);
          r.smallest_output = std::fmin(r.smallest_output, std::fabs(static_cast<double>(sum)));
        }
      }
    }
    const int width = s.heads * d;
    const auto relu = [&](int t, int column) { return std::fmax(heads[column / d].output[t * d + column % d], Sum(0)); };
    for (int t = 0; t < n; ++t) {
      for (int ch = 0; ch < channels; ++ch) {
        Sum sum = 0;
        for (int column = 0; column < width; ++column) sum += static_cast<Sum>(v.proj[int64_t{ch} * width + column]) * relu(t, column);
        if (index(t, ch) >= 0) r.y[index(t, ch)] = static_cast<double>(round(sum + bias_of(v.proj_bias, ch)));
        for (int column = 0; column < width; ++column) proj_sum[int64_t{ch} * width + column] += grad_y[t * channels + ch] * relu(t, column);
        proj_bias_sum[ch] += grad_y[t * channels + ch];
      }
    }
    Array onward(n * s.split);  // the gradient of the next head's input
    for (int h = s.heads - 1; h >= 0; --h) {
      const PerHead& head = heads[h];
      Array grad_output(n * d), grad_scores(n * n), grad_q(n * e), grad(n * rows);
      for (int t = 0; t < n; ++t) {
        for (int ch = 0; ch < d; ++ch) {
          Sum sum = 0;
          for (int o = 0; o < channels; ++o) sum += static_cast<Sum>(v.proj[int64_t{o} * width + h * d + ch]) * grad_y[t * channels + o];
          sum = head.output[t * d + ch] > 0 ? round(sum) : Sum(0);
          grad_output[t * d + ch] = h + 1 < s.heads ? round(sum + onward[t * s.split + ch]) : sum;
        }
      }
      for (int i = 0; i < n; ++i) {
        Array grad_weights(n);
        Sum mean = 0;
        for (int j = 0; j < n; ++j) {
          Sum sum = 0;
          for (int ch = 0; ch < d; ++ch) sum += grad_output[i * d + ch] * head.y[j * rows + 2 * e + ch];
          grad_weights[j] = round(sum);
          mean += grad_weights[j] * head.weights[i * n + j];
        }
        for (int j = 0; j < n; ++j) {
          grad_scores[i * n + j] = round(head.weights[i * n + j] * (grad_weights[j] - mean));
          table_sum[h * n + std::abs(i / w - j / w) * w + std::abs(i % w - j % w)] += grad_scores[i * n + j];
        }
      }
      for (int j = 0; j < n; ++j) {
        for (int ch = 0; ch < d; ++ch) {
          Sum sum = 0;
          for (int i = 0; i < n; ++i) sum += head.weights[i * n + j] * grad_output[i * d + ch];
          grad[j * rows + 2 * e + ch] = round(sum);
        }
        for (int ch = 0; ch < e; ++ch) {
          Sum of_k = 0, of_q = 0;
          for (int i = 0; i < n; ++i) {
            of_k += grad_scores[i * n + j] * round(head.q[i * e + ch] * static_cast<Sum>(scale));
            of_q += grad_scores[j * n + i] * head.y[i * rows + e + ch];
          }
          grad[j * rows + e + ch] = round(of_k);
          grad_q[j * e + ch] = round(round(of_q) * static_cast<Sum>(scale));
          dw_bias_sum[h * e + ch] += grad_q[j * e + ch];
        }
      }
      const int size = s.kernel_sizes[h];
      for (int t = 0; t < n; ++t) {
        for (int ch = 0; ch < e; ++ch) {
          for (int ky = 0; ky < size; ++ky) {
            for (int kx = 0; kx < size; ++kx) {
              const int row = t / w + ky - size / 2, column = t % w + kx - size / 2;
              if (row < 0 || row >= w || column < 0 || column >= w) continue;
              const int64_t tap = dw_offset(s, h) + (ch * size + ky) * size + kx;
              grad[(row * w + column) * rows + ch] += static_cast<Sum>(v.dw[tap]) * grad_q[t * e + ch];
              dw_sum[tap] += grad_q[t * e + ch] * head.y[(row * w + column) * rows + ch];
            }
          }
        }
      }
      for (int t = 0; t < n; ++t) {
        for (int ch = 0; ch < e; ++ch) grad[t * rows + ch] = round(grad[t * rows + ch]);
        for (int row = 0; row < rows; ++row) {
          qkv_bias_sum[h * rows + row] += grad[t * rows + row];
          for (int j = 0; j < s.split; ++j) qkv_sum[(int64_t{h} * rows + row) * s.split + j] += grad[t * rows + row] * head.input[t * s.split + j];
        }
        for (int j = 0; j < s.split; ++j) {
          Sum sum = 0;
          for (int row = 0; row < rows; ++row) sum += grad[t * rows + row] * static_cast<Sum>(v.qkv[(int64_t{h} * rows + row) * s.split + j]);
          onward[t * s.split + j] = round(sum);
          if (index(t, h * s.split + j) >= 0) r.grad_x[index(t, h * s.split + j)] = static_cast<double>(round(sum));
        }
      }
    }
  }
  const auto finished = [&](const Array& sums) {
    std::vector<double> values;
    for (const Sum sum : sums) values.push_back(static_cast<double>(round(sum)));
    return values;
  };
  r.qkv = finished(qkv_sum), r.qkv_bias = finished(qkv_bias_sum), r.dw = finished(dw_sum), r.dw_bias = finished(dw_bias_sum);
  r.table = finished(table_sum), r.proj = finished(proj_sum), r.proj_bias = finished(proj_bias_sum);
  return r;
}

// Memory that starts as NaN in every element type, so that what is read before it is written shows. Exactly as large as asked: a sanitizer sees the
// first byte beyond.
struct Poisoned {
  explicit Poisoned(int64_t bytes) : data(new char[static_cast<size_t>(bytes)]) { std::memset(data.get(), 0xff, static_cast<size_t>(bytes)); }
  std::unique_ptr<char[]> data;
};

// The kernels' blocks on the CPU. limit is the shared memory a block may have, blocks the size of the grid, order that of the warps in each phase.
template <class T>
Results emulated(const Case& c, const Values& v, double scale, int64_t limit, int64_t blocks, const std::array<int, kWarps>& order) {
  const Shape s = c.shape();
  const auto tensor = [](const std::vector<double>& values) {
    std::vector<T> result;
    for (const double value : values) result.push_back(from_float<T>(static_cast<float>(value)));
    return result;
  };
  const auto pointer = [](const std::vector<T>& values) -> const void* { return values.empty() ? nullptr : values.data(); };
  // Maps in the case's layout; results start as NaN.
  const int64_t pixels = int64_t{s.height} * s.width, channels = s.channels(), image = pixels * channels;
  const auto strides = [&](void* data) {
    return c.channels_last ? Map{data, image, 1, s.width * channels, channels} : Map{data, image, pixels, s.width, 1};
  };
  const auto place = [&](const Map& map, int64_t i) {
    return i / image * map.batch_stride + i % image / pixels * map.dim_stride + i % pixels / s.width * map.height_stride +
           i % s.width * map.width_stride;
  };
  const auto laid_out = [&](const std::vector<double>& values) {
    std::vector<T> map(values.size());
    for (size_t i = 0; i < values.size(); ++i) map[place(strides(nullptr), i)] = from_float<T>(static_cast<float>(values[i]));
    return map;
  };
  const auto read_back = [&](const std::vector<T>& map) {
    std::vector<double> values(map.size());
    for (size_t i = 0; i < map.size(); ++i) values[i] = to_float(map[place(strides(nullptr), i)]);
    return values;
  };
  std::vector<T> x = laid_out(v.x), grad_y = laid_out(v.grad_y), nothing(v.x.size(), from_float<T>(NAN)), y = nothing, grad_x = nothing;
  const std::vector<T> qkv = tensor(v.qkv), qkv_bias = tensor(v.qkv_bias), dw = tensor(v.dw), dw_bias = tensor(v.dw_bias), table = tensor(v.table),
                       proj = tensor(v.proj), proj_bias = tensor(v.proj_bias);
  const Weights weights = {pointer(qkv),  pointer(qkv_bias),  pointer(dw),      pointer(dw_bias),    pointer(table),
                           pointer(proj), pointer(proj_bias), s.split % 2 == 0, s.value_dim % 2 == 0};
  const auto run = [&](auto& args, auto&& kernel) {
    for (int64_t index = 0; index < blocks; ++index) {
      const Poisoned shared(args.layout.shared_bytes), workspace(args.layout.workspace_bytes);
      kernel(Block{shared.data.get(), workspace.data.get(), index, blocks, order.data()});
    }
  };

  ForwardArguments forward{s, forward_layout(s, sizeof(T), limit), strides(x.data()), strides(y.data()), weights, static_cast<float>(scale), nullptr};
  run(forward, [&](const Block& block) {
    switch (variant_of(s, forward.layout.workspace_bytes)) {
      case Variant::kWindow4: return forward_block<T, 1, false>(block, forward);
      case Variant::kWindow8: return forward_block<T, 4, false>(block, forward);
      default: return forward_block<T, kMaxRowBlocks, true>(block, forward);
    }
  });

  const GradientOffsets offsets = gradient_offsets(s);
  std::vector<float> partial(static_cast<size_t>(blocks * offsets.total), NAN);
  BackwardArguments backward{
      s,
      backward_layout(s, sizeof(T), limit),
      offsets,
      strides(grad_y.data()),
      strides(x.data()),
      strides(grad_x.data()),
      weights,
      static_cast<float>(scale),
      true,
      true,
      partial.data(),
      nullptr};
  run(backward, [&](const Block& block) {
    switch (variant_of(s, backward.layout.workspace_bytes)) {
      case Variant::kWindow4: return backward_block<T, 1, false>(block, backward);
      case Variant::kWindow8: return backward_block<T, 4, false>(block, backward);
      default: return backward_block<T, kMaxRowBlocks, true>(block, backward);
    }
  });
  const std::array<int64_t, WeightGradients::kCount> ends = {offsets.qkv_bias, offsets.dw,        offsets.dw_bias, offsets.table,
                                                             offsets.proj,     offsets.proj_bias, offsets.total};
  std::array<std::vector<T>, WeightGradients::kCount> grads;
  WeightGradients gradients{};
  for (int i = 0; i < WeightGradients::kCount; ++i) {
    grads[i].assign(static_cast<size_t>(ends[i] - (i == 0 ? 0 : ends[i - 1])), from_float<T>(NAN));
    gradients.data[i] = grads[i].data(), gradients.end[i] = ends[i];
  }
  for (int64_t at = 0; at < offsets.total; ++at) gradient_of_weight<T>(partial.data(), blocks, offsets.total, gradients, at);

  const auto doubles = [](const std::vector<T>& values) {
    std::vector<double> result;
    for (const T value : values) result.push_back(to_float(value));
    return result;
  };
  Results r;
  r.y = read_back(y), r.grad_x = read_back(grad_x);
  r.qkv = doubles(grads[0]), r.qkv_bias = doubles(grads[1]), r.dw = doubles(grads[2]), r.dw_bias = doubles(grads[3]), r.table = doubles(grads[4]);
  r.proj = doubles(grads[5]), r.proj_bias = doubles(grads[6]);
  return r;
}

}  // namespace vitkernels::test
