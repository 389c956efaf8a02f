// The backward kernel's block: a window at a time, everything recomputed from its pixels, then the heads in reverse.
//
// Gradients of the weights are sums over windows. Each block of a fixed grid adds its windows, in order, to its own row of partial sums in global
// memory, where each element has one owner; gradient_of_weight then adds the blocks' rows in order. No atomics: the same bits on every run.
#pragma once

#include "cascaded_group/cuda_forward.h"

namespace vitkernels::cascaded_group::cuda {

// A block's row of partial sums: set by its first window, added to by the others.
struct Partial {
  float* data;
  bool first;
  VITKERNELS_DEVICE void add(int64_t at, float value) const { data[at] = first ? value : data[at] + value; }
};

// The pair at rows k and k + 1 of one column of a matrix in the block's memory.
template <class T>
VITKERNELS_DEVICE Pair<T> down_column(const T* matrix, int stride, int k, int column) {
  return {matrix[k * stride + column], matrix[(k + 1) * stride + column]};
}

// Row blocks of a product that a warp accumulates at once, where the rows are not tokens.
constexpr int kWeightBlocks = 4;

// target [rows, columns] (dense) += left^T right over the tokens, for left [N, >= rows] and right [N, >= columns].
template <class T, class Target>
VITKERNELS_DEVICE void add_product_over_tokens(
    int warp, int tokens, int rows, int columns, const T* left, int left_stride, const T* right, int right_stride, const Target& target) {
  block_product<T, kWeightBlocks>(
      warp, blocks_of(rows), blocks_of(columns), 1, tokens, [&](int, int row, int k) { return down_column(left, left_stride, k, row); },
      [&](int, int column, int k) { return down_column(right, right_stride, k, column); }, Zero{},
      [&](int row, int column, float x, float y) {
        if (column < columns) target(row, column, x);
        if (column + 1 < columns) target(row, column + 1, y);
      });
}

// The sum over the tokens of one column.
template <class T>
VITKERNELS_DEVICE float column_sum(const T* matrix, int stride, int tokens, int column) {
  float sum = 0;
  for (int token = 0; token < tokens; ++token) sum += to_float(matrix[token * stride + column]);
  return sum;
}

// Through the projection and ReLU: gradient = relu'(outputs) * (grad_y proj), and the projection's own gradients.
template <class T, int kBlocks>
VITKERNELS_DEVICE void project_back(
    int warp, const BackwardArguments& args, const Partial& partial, const T* grad_y, const T* outputs, T* gradient, int stride) {
  const Shape& shape = args.shape;
  const int grad_stride = args.layout.grad_y.stride, columns = shape.head_columns(), width = shape.value_dim, channels = shape.channels();
  for (int index = 0; index < shape.heads; ++index) {
    const WeightMatrix<T> weight = proj_weight<T>(shape, args.weights, index);
    const T* output = outputs + index * columns;
    block_product<T, product_blocks(kBlocks)>(
        warp, shape.row_blocks(), blocks_of(width), 1, padded(channels),
        [&](int, int token, int k) { return load_pair(grad_y + token * grad_stride + k); },
        [&](int, int column, int k) { return Pair<T>{weight.at(k, column), weight.at(k + 1, column)}; }, Zero{},
        [&](int token, int column, float x, float y) {
          const Pair<T> out = load_pair(output + token * stride + column);
          store_pair(gradient + index * columns + token * stride + column, to_float(out.first) > 0 ? x : 0, to_float(out.second) > 0 ? y : 0);
        });
    if (args.need_weights) {
      add_product_over_tokens(warp, shape.rows(), channels, width, grad_y, grad_stride, output, stride, [&](int row, int column, float value) {
        if (row < channels) partial.add(args.offsets.proj + static_cast<int64_t>(row) * shape.heads * width + index * width + column, value);
      });
    }
  }
  if (args.need_weights) {
    threads_over<kWarps>(warp, channels, [&](int channel) {
      partial.add(args.offsets.proj_bias + channel, column_sum(grad_y, grad_stride, shape.tokens(), channel));
    });
  }
}

// Softmax weights and the gradient of the scores, [N, N] each; gradient is that of the head's output.
template <class T, int kBlocks>
VITKERNELS_DEVICE void attend_back(
    int warp, const Shape& shape, float scale, const Head<T>& head, const T* gradient, int stride, T* weights, T* scores, int square) {
  const int row_blocks = shape.row_blocks();
  for (int block = warp; block < row_blocks; block += kWarps) {
    const int row0 = kTile * block;
    Lanes<float, 4> s[2 * kBlocks];
    Lanes<float, 2> sum;
    exponentials<T, kBlocks>(shape, scale, head, row0, s, sum);
    // The weights wait in memory, each where the same lane finds it again, while s holds their gradient.
    each_lane([&](int of_warp, int slot) {
      const int lane = afresh(of_warp);
      VITKERNELS_UNROLL
      for (int t = 0; t < 2 * kBlocks; ++t) {
        if (t >= 2 * row_blocks) continue;
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; e += 2) {
          const float total = 1 / sum[slot][e >> 1];
          store_pair(weights + (row0 + c_row(lane, e)) * square + 8 * t + c_column(lane, e), s[t][slot][e] * total, s[t][slot][e + 1] * total);
          s[t][slot][e] = s[t][slot][e + 1] = 0;
        }
      }
    });
    for (int k = 0; k < padded(shape.value_dim); k += kTile) {
      Lanes<Pair<T>, 4> left;
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int p = 0; p < 4; ++p) left[slot][p] = load_pair(gradient + (row0 + a_row(lane, p)) * stride + k + a_depth(lane, p));
      });
      VITKERNELS_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        if (i >= row_blocks) continue;
        Lanes<Pair<T>, 2> values[2];
        each_lane([&](int of_warp, int slot) {
          const int lane = afresh(of_warp);
          VITKERNELS_UNROLL
          for (int h = 0; h < 2; ++h) {
            VITKERNELS_UNROLL
            for (int p = 0; p < 2; ++p) {
              values[h][slot][p] = down_column(head.v, head.value_stride, k + b_depth(lane, p), kTile * i + 8 * h + b_column(lane));
            }
          }
        });
        mma(s + 2 * i, left, values);
      }
    }
    Lanes<float, 2> mean;
    each_lane([&](int of_warp, int slot) {
      const int lane = afresh(of_warp);
      mean[slot][0] = mean[slot][1] = 0;
      VITKERNELS_UNROLL
      for (int t = 0; t < 2 * kBlocks; ++t) {
        if (t >= 2 * row_blocks) continue;
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; e += 2) {
          const Pair<T> weight = load_pair(weights + (row0 + c_row(lane, e)) * square + 8 * t + c_column(lane, e));
          mean[slot][e >> 1] += to_float(weight.first) * s[t][slot][e] + to_float(weight.second) * s[t][slot][e + 1];
        }
      }
    });
    row_sum(mean);
    each_lane([&](int of_warp, int slot) {
      const int lane = afresh(of_warp);
      VITKERNELS_UNROLL
      for (int t = 0; t < 2 * kBlocks; ++t) {
        if (t >= 2 * row_blocks) continue;
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; e += 2) {
          const int at = (row0 + c_row(lane, e)) * square + 8 * t + c_column(lane, e);
          const Pair<T> weight = load_pair(weights + at);
          const float average = mean[slot][e >> 1];
          store_pair(scores + at, to_float(weight.first) * (s[t][slot][e] - average), to_float(weight.second) * (s[t][slot][e + 1] - average));
        }
      }
    });
  }
}

// One entry of the bias table's gradient: the sum over all pairs of tokens dy rows and dx columns apart.
template <class T>
VITKERNELS_DEVICE float table_gradient(const T* scores, int square, int w, int entry) {
  const int dy = entry / w, dx = entry % w;
  const auto both = [&](int a, int b) { return to_float(scores[a * square + b]) + (a == b ? 0.0f : to_float(scores[b * square + a])); };
  float sum = 0;
  for (int y = 0; y + dy < w; ++y) {
    for (int x = 0; x + dx < w; ++x) {
      const int top = y * w + x, bottom = (y + dy) * w + x;
      sum += both(top, bottom + dx);
      if (dy > 0 && dx > 0) sum += both(top + dx, bottom);
    }
  }
  return sum;
}

// The depthwise convolution backwards: the gradient of q_raw into grad_qkv's first columns, and the gradients of its weight and bias.
template <class T>
VITKERNELS_DEVICE void convolve_back(
    int warp, const BackwardArguments& args, const Partial& partial, int index, const Head<T>& head, const T* grad_q, T* grad_qkv, int grad_stride) {
  const Shape& shape = args.shape;
  const int w = shape.window, tokens = shape.tokens(), reach = reach_of(shape, index), side = 2 * reach + 1, pairs = padded(shape.key_dim) / 2;
  threads_over<kWarps>(warp, shape.rows() * pairs, [&](int i) {
    const int token = i / pairs, channel = 2 * (i % pairs), row = row_of(head.places[token]), column = column_of(head.places[token]);
    float x = 0, y = 0;
    if (token < tokens) {
      for (int y_to = max_of(0, row - reach); y_to <= min_of(w - 1, row + reach); ++y_to) {
        for (int x_to = max_of(0, column - reach); x_to <= min_of(w - 1, column + reach); ++x_to) {
          const Pair<T> grad = load_pair(grad_q + (y_to * w + x_to) * head.key_stride + channel);
          const Pair<T> tap = load_pair(head.taps + ((row - y_to + reach) * side + column - x_to + reach) * head.tap_stride + channel);
          x += to_float(grad.first) * to_float(tap.first);
          y += to_float(grad.second) * to_float(tap.second);
        }
      }
    }
    store_pair(grad_qkv + token * grad_stride + channel, x, y);
  });
  if (!args.need_weights) return;
  const int size = shape.kernel_sizes[index], keys = shape.key_dim;
  const int64_t at = args.offsets.dw + dw_offset(shape, index);
  threads_over<kWarps>(warp, size * size * keys, [&](int i) {
    const int channel = i % keys, tap = i / keys, dy = tap / size - size / 2, dx = tap % size - size / 2;
    float sum = 0;
    // Over the tokens that the tap reads, as in the forward: no distance changes its sign in a loop's length.
    for (int row = max_of(0, dy); row < min_of(w, w + dy); ++row) {
      for (int column = max_of(0, dx); column < min_of(w, w + dx); ++column) {
        const int token = row * w + column;
        sum += to_float(grad_q[(token - dy * w - dx) * head.key_stride + channel]) * to_float(head.q_raw[token * head.key_stride + channel]);
      }
    }
    partial.add(at + static_cast<int64_t>(channel) * size * size + tap, sum);
  });
  threads_over<kWarps>(warp, keys, [&](int channel) {
    partial.add(args.offsets.dw_bias + index * keys + channel, column_sum(grad_q, head.key_stride, tokens, channel));
  });
}

template <class T, int kBlocks, bool kAnywhere>
VITKERNELS_DEVICE void backward_block(const Block& block, const BackwardArguments& args) {
  const Shape& shape = args.shape;
  const BackwardLayout& layout = args.layout;
  const Head<T> head = head_of<T, kAnywhere>(block, layout.head);
  T *inputs = block.at<T, kAnywhere>(layout.inputs), *outputs = block.at<T, kAnywhere>(layout.outputs),
    *gradient = block.at<T, kAnywhere>(layout.gradient);
  T *grad_y = block.at<T, kAnywhere>(layout.grad_y), *weights = block.at<T, kAnywhere>(layout.weights),
    *scores = block.at<T, kAnywhere>(layout.scores);
  T *grad_q = block.at<T, kAnywhere>(layout.grad_q), *grad_qkv = block.at<T, kAnywhere>(layout.grad_qkv);
  const int stride = layout.inputs.stride, square = layout.scores.stride, grad_stride = layout.grad_qkv.stride;
  const int columns = shape.head_columns(), rows = shape.rows(), row_blocks = shape.row_blocks(), keys = padded(shape.key_dim);
  block.phase([&](int warp) { fill_places(warp, shape, head); });
  for (int64_t window = block.index; window < shape.windows(); window += block.count) {
    const Corner corner = corner_of(shape, window);
    const Partial partial{args.partial + block.index * args.offsets.total, window == block.index};
    block.phase([&](int warp) {
      load_window(warp, shape, corner, head.places, args.x, shape.heads, shape.split, columns, inputs, stride);
      load_window(warp, shape, corner, head.places, args.grad_y, 1, shape.channels(), padded(shape.channels()), grad_y, layout.grad_y.stride);
    });
    cascade<T, kBlocks>(block, shape, args.weights, args.scale, head, inputs, outputs, stride);
    block.phase([&](int warp) { project_back<T, kBlocks>(warp, args, partial, grad_y, outputs, gradient, stride); });
    for (int index = shape.heads - 1; index >= 0; --index) {
      const T* input = inputs + index * columns;
      T* grad = gradient + index * columns;
      if (index + 1 < shape.heads) {  // the last head's are still there
        block.phase([&](int warp) {
          stage_head(warp, shape, args.weights, index, head);
          project_qkv<T, kBlocks>(warp, shape, args.weights, index, input, stride, head);
        });
        block.phase([&](int warp) { convolve(warp, shape, args.weights, index, head); });
      }
      block.phase([&](int warp) { attend_back<T, kBlocks>(warp, shape, args.scale, head, grad, stride, weights, scores, square); });
      block.phase([&](int warp) {
        // grad_v = weights^T grad
        block_product<T, product_blocks(kBlocks)>(
            warp, row_blocks, blocks_of(shape.value_dim), 1, rows, [&](int, int row, int k) { return down_column(weights, square, k, row); },
            [&](int, int column, int k) { return down_column(grad, stride, k, column); }, Zero{},
            [&](int token, int column, float x, float y) { store_pair(grad_qkv + token * grad_stride + 2 * keys + column, x, y); });
        // grad_k = scale scores^T q
        block_product<T, product_blocks(kBlocks)>(
            warp, row_blocks, keys / kTile, 1, rows, [&](int, int row, int k) { return down_column(scores, square, k, row); },
            [&](int, int column, int k) { return down_column(head.q, head.key_stride, k, column); }, Zero{},
            [&](int token, int column, float x, float y) {
              store_pair(grad_qkv + token * grad_stride + keys + column, x * args.scale, y * args.scale);
            });
        // grad_q = scale scores k
        block_product<T, product_blocks(kBlocks)>(
            warp, row_blocks, keys / kTile, 1, rows, [&](int, int row, int k) { return load_pair(scores + row * square + k); },
            [&](int, int column, int k) { return down_column(head.k, head.key_stride, k, column); }, Zero{},
            [&](int token, int column, float x, float y) { store_pair(grad_q + token * head.key_stride + column, x * args.scale, y * args.scale); });
        if (args.need_weights) {
          threads_over<kWarps>(warp, shape.tokens(), [&](int entry) {
            partial.add(args.offsets.table + index * shape.tokens() + entry, table_gradient(scores, square, shape.window, entry));
          });
        }
      });
      block.phase([&](int warp) { convolve_back(warp, args, partial, index, head, grad_q, grad_qkv, grad_stride); });
      block.phase([&](int warp) {
        const WeightMatrix<T> weight = qkv_weight<T>(shape, args.weights, index);
        // grad_input = grad_qkv weight: the gradient of this split of x and of the output of the head before.
        block_product<T, product_blocks(kBlocks)>(
            warp, row_blocks, blocks_of(shape.split), 1, qkv_columns(shape),
            [&](int, int token, int k) { return load_pair(grad_qkv + token * grad_stride + k); },
            [&](int, int column, int k) { return Pair<T>{weight.at(qkv_row(shape, k), column), weight.at(qkv_row(shape, k + 1), column)}; }, Zero{},
            [&](int token, int channel, float x, float y) {
              if (index > 0) {
                T* before = grad - columns + token * stride + channel;
                const Pair<T> sum = load_pair(before);
                store_pair(before, to_float(sum.first) + x, to_float(sum.second) + y);
              }
              const int place = head.places[token];
              if (!args.need_x || token >= shape.tokens() || channel >= shape.split || !is_pixel(shape, corner, place)) return;
              const int64_t at = static_cast<int64_t>(index * shape.split + channel) * args.grad_x.dim_stride;
              T* target = static_cast<T*>(args.grad_x.data) + pixel_offset(args.grad_x, corner, place) + at;
              target[0] = from_float<T>(x);
              if (channel + 1 < shape.split) target[args.grad_x.dim_stride] = from_float<T>(y);
            });
        if (!args.need_weights) return;
        const int qkv_rows = shape.qkv_rows();
        add_product_over_tokens(
            warp, rows, qkv_columns(shape), shape.split, grad_qkv, grad_stride, input, stride, [&](int column, int channel, float value) {
              const int row = qkv_row(shape, column);
              if (row >= 0) partial.add(args.offsets.qkv + (static_cast<int64_t>(index) * qkv_rows + row) * shape.split + channel, value);
            });
        threads_over<kWarps>(warp, qkv_columns(shape), [&](int column) {
          const int row = qkv_row(shape, column);
          if (row >= 0) partial.add(args.offsets.qkv_bias + index * qkv_rows + row, column_sum(grad_qkv, grad_stride, shape.tokens(), column));
        });
      });
    }
  }
}

// Element at of all gradients in a row: the sum over the blocks, to the tensor it belongs to.
template <class T>
VITKERNELS_DEVICE void gradient_of_weight(const float* partial, int64_t blocks, int64_t total, const WeightGradients& gradients, int64_t at) {
  float sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * total + at];
  int64_t start = 0;
  for (int i = 0; i < WeightGradients::kCount; ++i) {
    if (at < gradients.end[i]) {
      static_cast<T*>(gradients.data[i])[at - start] = from_float<T>(sum);
      return;
    }
    start = gradients.end[i];
  }
}

}  // namespace vitkernels::cascaded_group::cuda
