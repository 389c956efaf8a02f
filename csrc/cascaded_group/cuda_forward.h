// The forward kernel's block: one window at a time through all heads. The backward kernel recomputes with the same pieces.
#pragma once

#include "cascaded_group/cuda_arguments.h"
#include "cascaded_group/cuda_warp.h"

namespace vitkernels::cascaded_group::cuda {

// A weight matrix in global memory; reads as zero outside of its rows and columns.
template <class T>
struct WeightMatrix {
  const T* data;
  int rows, columns, stride;
  bool paired;

  VITKERNELS_DEVICE T at(int row, int column) const {
    return row >= 0 && row < rows && column < columns ? data[static_cast<int64_t>(row) * stride + column] : from_float<T>(0);
  }
  // (row, column) and (row, column + 1), column even.
  VITKERNELS_DEVICE Pair<T> along_row(int row, int column) const {
    if (!paired) return {at(row, column), at(row, column + 1)};
    return row >= 0 && row < rows && column < columns ? load_pair(data + static_cast<int64_t>(row) * stride + column) : pair_of<T>(0, 0);
  }
};

template <class T>
VITKERNELS_DEVICE WeightMatrix<T> qkv_weight(const Shape& shape, const Weights& weights, int head) {
  const int rows = shape.qkv_rows();
  return {static_cast<const T*>(weights.qkv) + static_cast<int64_t>(head) * rows * shape.split, rows, shape.split, shape.split, weights.qkv_paired};
}

template <class T>
VITKERNELS_DEVICE WeightMatrix<T> proj_weight(const Shape& shape, const Weights& weights, int head) {
  const int columns = shape.value_dim;
  return {static_cast<const T*>(weights.proj) + head * columns, shape.channels(), columns, shape.heads * columns, weights.proj_paired};
}

// Where one head's matrices lie (schedule.h: HeadLayout).
template <class T>
struct Head {
  int* places;
  float* bias;
  T *q, *k, *v, *q_raw, *taps;
  int key_stride, value_stride, tap_stride;
};

template <class T, bool kAnywhere>
VITKERNELS_DEVICE Head<T> head_of(const Block& block, const HeadLayout& layout) {
  return {
      block.at<int, kAnywhere>(layout.places),
      block.at<float, kAnywhere>(layout.bias),
      block.at<T, kAnywhere>(layout.q),
      block.at<T, kAnywhere>(layout.k),
      block.at<T, kAnywhere>(layout.v),
      block.at<T, kAnywhere>(layout.q_raw),
      block.at<T, kAnywhere>(layout.taps),
      layout.q.stride,
      layout.v.stride,
      layout.taps.stride};
}

template <class T>
VITKERNELS_DEVICE void fill_places(int warp, const Shape& shape, const Head<T>& head) {
  threads_over<kWarps>(warp, shape.rows(), [&](int token) { head.places[token] = token < shape.tokens() ? place_of(token, shape.window) : 0; });
}

VITKERNELS_DEVICE int64_t pixel_offset(const Map& map, const Corner& corner, int place) {
  return corner.image * map.batch_stride + (corner.row + row_of(place)) * map.height_stride + (corner.column + column_of(place)) * map.width_stride;
}

// The window's pixels to target [N, heads * columns], channel c of head h to column h * columns + c; zero beyond the map, the window and the head's
// channels. Neighbouring lanes read neighbours in memory: pixels of a row, or channels of a channels_last map.
template <class T>
VITKERNELS_DEVICE void load_window(
    int warp, const Shape& shape, const Corner& corner, const int* places, const Map& map, int heads, int channels, int columns, T* target,
    int stride) {
  const int rows = shape.rows(), tokens = shape.tokens();
  const T* source = static_cast<const T*>(map.data);
  const auto value = [&](int token, int head, int channel) {
    const int place = places[token];
    if (token >= tokens || channel >= channels || !is_pixel(shape, corner, place)) return from_float<T>(0);
    return source[pixel_offset(map, corner, place) + static_cast<int64_t>(head * channels + channel) * map.dim_stride];
  };
  for (int head = 0; head < heads; ++head) {
    if (map.dim_stride == 1) {
      for (int token = warp; token < rows; token += kWarps) {
        lanes_over(columns, [&](int channel) { target[token * stride + head * columns + channel] = value(token, head, channel); });
      }
    } else {
      for (int channel = warp; channel < columns; channel += kWarps) {
        lanes_over(rows, [&](int token) { target[token * stride + head * columns + channel] = value(token, head, channel); });
      }
    }
  }
}

// The head's bias table and the taps of its depthwise weights that can reach a pixel.
template <class T>
VITKERNELS_DEVICE void stage_head(int warp, const Shape& shape, const Weights& weights, int index, const Head<T>& head) {
  const int tokens = shape.tokens(), size = shape.kernel_sizes[index], reach = reach_of(shape, index), side = 2 * reach + 1,
            keys = padded(shape.key_dim);
  const T* table = static_cast<const T*>(weights.table) + static_cast<int64_t>(index) * tokens;
  const T* dw = static_cast<const T*>(weights.dw) + dw_offset(shape, index);
  threads_over<kWarps>(warp, tokens, [&](int entry) { head.bias[entry] = to_float(table[entry]); });
  threads_over<kWarps>(warp, side * side * keys, [&](int i) {
    const int tap = i / keys, channel = i % keys, y = tap / side + size / 2 - reach, x = tap % side + size / 2 - reach;
    head.taps[i] = channel < shape.key_dim ? dw[(static_cast<int64_t>(channel) * size + y) * size + x] : from_float<T>(0);
  });
}

// q_raw, k and v = the head's input [N, split] times its weight, plus bias; rows beyond the window are zero.
template <class T, int kBlocks>
VITKERNELS_DEVICE void project_qkv(int warp, const Shape& shape, const Weights& weights, int index, const T* input, int stride, const Head<T>& head) {
  const int keys = padded(shape.key_dim), tokens = shape.tokens();
  const WeightMatrix<T> weight = qkv_weight<T>(shape, weights, index);
  const T* bias = static_cast<const T*>(weights.qkv_bias);
  block_product<T, product_blocks(kBlocks)>(
      warp, shape.row_blocks(), qkv_columns(shape) / kTile, 1, padded(shape.split),
      [&](int, int token, int k) { return load_pair(input + token * stride + k); },
      [&](int, int column, int k) { return weight.along_row(qkv_row(shape, column), k); },
      [&](int column) {
        const int row = qkv_row(shape, column);
        return bias != nullptr && row >= 0 ? to_float(bias[index * weight.rows + row]) : 0.0f;
      },
      [&](int token, int column, float x, float y) {
        if (token >= tokens) x = y = 0;
        if (column < keys) {
          store_pair(head.q_raw + token * head.key_stride + column, x, y);
        } else if (column < 2 * keys) {
          store_pair(head.k + token * head.key_stride + column - keys, x, y);
        } else {
          T* v = head.v + (column - 2 * keys) * head.value_stride + token;
          v[0] = from_float<T>(x);
          v[head.value_stride] = from_float<T>(y);
        }
      });
}

// q = the depthwise convolution of q_raw, zero-padded at the window's edge.
//
// The loops run over the neighbours' own rows and columns, not over distances from -reach to reach: of max(-reach, -column) in a loop's length ptxas 13.0
// makes a VIMNMX3 for sm_90 that takes column without its sign, and on an H200 a loop that starts left of the middle ran too far.
template <class T>
VITKERNELS_DEVICE void convolve(int warp, const Shape& shape, const Weights& weights, int index, const Head<T>& head) {
  const int w = shape.window, tokens = shape.tokens(), reach = reach_of(shape, index), side = 2 * reach + 1, pairs = padded(shape.key_dim) / 2;
  const T* bias = static_cast<const T*>(weights.dw_bias);
  threads_over<kWarps>(warp, shape.rows() * pairs, [&](int i) {
    const int token = i / pairs, channel = 2 * (i % pairs), row = row_of(head.places[token]), column = column_of(head.places[token]);
    float x = 0, y = 0;
    if (token < tokens) {
      if (bias != nullptr) {
        if (channel < shape.key_dim) x = to_float(bias[index * shape.key_dim + channel]);
        if (channel + 1 < shape.key_dim) y = to_float(bias[index * shape.key_dim + channel + 1]);
      }
      for (int y_from = max_of(0, row - reach); y_from <= min_of(w - 1, row + reach); ++y_from) {
        for (int x_from = max_of(0, column - reach); x_from <= min_of(w - 1, column + reach); ++x_from) {
          const Pair<T> q = load_pair(head.q_raw + (y_from * w + x_from) * head.key_stride + channel);
          const Pair<T> tap = load_pair(head.taps + ((y_from - row + reach) * side + x_from - column + reach) * head.tap_stride + channel);
          x += to_float(q.first) * to_float(tap.first);
          y += to_float(q.second) * to_float(tap.second);
        }
      }
    }
    store_pair(head.q + token * head.key_stride + channel, x, y);
  });
}

// For the 16 queries from row0: s = e^(score - the row's maximum), zero beyond the window, and the row sums. s[t] holds keys 8t to 8t + 7.
template <class T, int kBlocks>
VITKERNELS_DEVICE void exponentials(
    const Shape& shape, float scale, const Head<T>& head, int row0, Lanes<float, 4> (&s)[2 * kBlocks], Lanes<float, 2>& sum) {
  const int key_blocks = shape.row_blocks(), tokens = shape.tokens();
  each_lane([&](int, int slot) {
    VITKERNELS_UNROLL
    for (int t = 0; t < 2 * kBlocks; ++t) s[t][slot][0] = s[t][slot][1] = s[t][slot][2] = s[t][slot][3] = 0;
  });
  VITKERNELS_ROLLED
  for (int k = 0; k < padded(shape.key_dim); k += kTile) {
    Lanes<Pair<T>, 4> q;
    each_lane([&](int lane, int slot) {
      VITKERNELS_UNROLL
      for (int p = 0; p < 4; ++p) q[slot][p] = load_pair(head.q + (row0 + a_row(lane, p)) * head.key_stride + k + a_depth(lane, p));
    });
    VITKERNELS_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i >= key_blocks) continue;
      Lanes<Pair<T>, 2> keys[2];
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int h = 0; h < 2; ++h) {
          VITKERNELS_UNROLL
          for (int p = 0; p < 2; ++p)
            keys[h][slot][p] = load_pair(head.k + (kTile * i + 8 * h + b_column(lane)) * head.key_stride + k + b_depth(lane, p));
        }
      });
      mma(s + 2 * i, q, keys);
    }
  }
  Lanes<float, 2> top;
  each_lane([&](int of_warp, int slot) {
    const int lane = afresh(of_warp);
    top[slot][0] = top[slot][1] = -INFINITY;
    const int places[2] = {head.places[row0 + c_row(lane, 0)], head.places[row0 + c_row(lane, 2)]};
    VITKERNELS_UNROLL
    for (int t = 0; t < 2 * kBlocks; ++t) {
      if (t >= 2 * key_blocks) continue;
      VITKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int key = 8 * t + c_column(lane, e);
        float& score = s[t][slot][e];
        score = key < tokens ? score * scale + head.bias[bias_entry(places[e >> 1], head.places[key], shape.window)] : -INFINITY;
        top[slot][e >> 1] = fmaxf(top[slot][e >> 1], score);
      }
    }
  });
  row_max(top);
  each_lane([&](int, int slot) {
    sum[slot][0] = sum[slot][1] = 0;
    VITKERNELS_UNROLL
    for (int t = 0; t < 2 * kBlocks; ++t) {
      if (t >= 2 * key_blocks) continue;
      VITKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        s[t][slot][e] = exponential<T>(s[t][slot][e] - top[slot][e >> 1]);
        sum[slot][e >> 1] += s[t][slot][e];
      }
    }
  });
  row_sum(sum);
}

// The head's output: store(token, column, x, y) gets softmax(scores) v.
template <class T, int kBlocks, class Store>
VITKERNELS_DEVICE void attend(int warp, const Shape& shape, float scale, const Head<T>& head, const Store& store) {
  const int row_blocks = shape.row_blocks(), value_blocks = blocks_of(shape.value_dim), parts = value_parts(row_blocks, value_blocks);
  for (int item = warp; item < row_blocks * parts; item += kWarps) {
    const int row0 = kTile * (item % row_blocks);
    Lanes<float, 4> s[2 * kBlocks];
    Lanes<float, 2> sum;
    exponentials<T, kBlocks>(shape, scale, head, row0, s, sum);
    // The layout of a result is that of a left operand: the weights go from one product to the next in registers.
    Lanes<Pair<T>, 4> weights[kBlocks];
    each_lane([&](int, int slot) {
      VITKERNELS_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        VITKERNELS_UNROLL
        for (int p = 0; p < 4; ++p) {
          const float* from = s[2 * i + (p >> 1)][slot] + 2 * (p & 1);
          weights[i][slot][p] = pair_of<T>(from[0], from[1]);
        }
      }
    });
    VITKERNELS_ROLLED
    for (int block = item / row_blocks; block < value_blocks; block += parts) {
      Lanes<float, 4> out[2];
      each_lane([&](int, int slot) {
        for (int e = 0; e < 4; ++e) out[0][slot][e] = out[1][slot][e] = 0;
      });
      VITKERNELS_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        if (i >= row_blocks) continue;
        Lanes<Pair<T>, 2> values[2];
        each_lane([&](int lane, int slot) {
          VITKERNELS_UNROLL
          for (int h = 0; h < 2; ++h) {
            const T* channel = head.v + (kTile * block + 8 * h + b_column(lane)) * head.value_stride + kTile * i;
            VITKERNELS_UNROLL
            for (int p = 0; p < 2; ++p) values[h][slot][p] = load_pair(channel + b_depth(lane, p));
          }
        });
        mma(out, weights[i], values);
      }
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; e += 2) {
          const float total = 1 / sum[slot][e >> 1];
          VITKERNELS_UNROLL
          for (int h = 0; h < 2; ++h) {
            store(row0 + c_row(lane, e), kTile * block + 8 * h + c_column(lane, e), out[h][slot][e] * total, out[h][slot][e + 1] * total);
          }
        }
      });
    }
  }
}

// All heads in cascade. inputs [N, heads * head_columns()] holds the window's pixels; each head's output is added to the input of the next, and put,
// after ReLU, in its columns of outputs, which may be inputs itself.
template <class T, int kBlocks>
VITKERNELS_DEVICE void cascade(
    const Block& block, const Shape& shape, const Weights& weights, float scale, const Head<T>& head, T* inputs, T* outputs, int stride) {
  for (int index = 0; index < shape.heads; ++index) {
    T *input = inputs + index * shape.head_columns(), *output = outputs + index * shape.head_columns();
    block.phase([&](int warp) {
      stage_head(warp, shape, weights, index, head);
      project_qkv<T, kBlocks>(warp, shape, weights, index, input, stride, head);
    });
    block.phase([&](int warp) { convolve(warp, shape, weights, index, head); });
    const bool last = index + 1 == shape.heads;
    block.phase([&](int warp) {
      attend<T, kBlocks>(warp, shape, scale, head, [&](int token, int column, float x, float y) {
        const int at = token * stride + column;
        store_pair(output + at, x < 0 ? 0 : x, y < 0 ? 0 : y);  // NaN stays
        if (!last) {
          T* next = input + shape.head_columns() + at;
          const Pair<T> split = load_pair(next);
          store_pair(next, to_float(split.first) + x, to_float(split.second) + y);
        }
      });
    });
  }
}

template <class T, int kBlocks, bool kAnywhere>
VITKERNELS_DEVICE void forward_block(const Block& block, const ForwardArguments& args) {
  const Shape& shape = args.shape;
  const Head<T> head = head_of<T, kAnywhere>(block, args.layout.head);
  T* tokens = block.at<T, kAnywhere>(args.layout.tokens);
  const int stride = args.layout.tokens.stride, columns = shape.head_columns();
  block.phase([&](int warp) { fill_places(warp, shape, head); });
  for (int64_t window = block.index; window < shape.windows(); window += block.count) {
    const Corner corner = corner_of(shape, window);
    block.phase([&](int warp) { load_window(warp, shape, corner, head.places, args.x, shape.heads, shape.split, columns, tokens, stride); });
    cascade<T, kBlocks>(block, shape, args.weights, args.scale, head, tokens, tokens, stride);
    block.phase([&](int warp) {
      const int channels = shape.channels();
      const T* bias = static_cast<const T*>(args.weights.proj_bias);
      block_product<T, product_blocks(kBlocks)>(
          warp, shape.row_blocks(), blocks_of(channels), shape.heads, padded(shape.value_dim),
          [&](int index, int token, int k) { return load_pair(tokens + token * stride + index * columns + k); },
          [&](int index, int channel, int k) { return proj_weight<T>(shape, args.weights, index).along_row(channel, k); },
          [&](int channel) { return bias != nullptr && channel < channels ? to_float(bias[channel]) : 0.0f; },
          [&](int token, int channel, float x, float y) {
            const int place = head.places[token];
            if (token >= shape.tokens() || channel >= channels || !is_pixel(shape, corner, place)) return;
            T* target = static_cast<T*>(args.y.data) + pixel_offset(args.y, corner, place) + channel * args.y.dim_stride;
            target[0] = from_float<T>(x);
            if (channel + 1 < channels) target[args.y.dim_stride] = from_float<T>(y);
          });
    });
  }
}

}  // namespace vitkernels::cascaded_group::cuda
