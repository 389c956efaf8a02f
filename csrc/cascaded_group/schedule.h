// The schedule of the CUDA kernels: which pixel a token is, which element a lane holds, where each buffer lies and how large it is.
//
// Plain constexpr code, compiled into the kernels and into the host tests (csrc/tests/test_cascaded_schedule.cpp), so that every index map is checked
// without a GPU. One thread block owns one window at a time; its tokens are the rows, the channels the columns of all matrices.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace vitkernels::cascaded_group::cuda {

constexpr int kTile = 16;  // rows, columns and depth of one step of a matrix product: a warp's two m16n8k16
constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxWindow = 14;
constexpr int kMaxRowBlocks = 13;  // ceil(14 * 14 / 16): a row of scores stays in registers
constexpr int kMaxHeads = 64;
constexpr int kMaxChannels = 1 << 15;  // of any one axis of the weights; keeps indices into one window's matrices in 31 bits
constexpr int64_t kSharedLimitSm80 = 163 * 1024;
constexpr int64_t kSharedLimitSm90 = 227 * 1024;

VITKERNELS_HD int min_of(int a, int b) { return a < b ? a : b; }
VITKERNELS_HD int max_of(int a, int b) { return a > b ? a : b; }
VITKERNELS_HD int blocks_of(int n) { return (n + kTile - 1) / kTile; }
VITKERNELS_HD int padded(int n) { return blocks_of(n) * kTile; }

// Elements from one row of a matrix to the next. Eight more than a multiple of 16: the eight rows that a warp reads at once then start four banks
// apart (16 bit) or eight (32 bit), so that a fragment is loaded without a bank conflict.
VITKERNELS_HD int row_stride(int columns) { return padded(columns) + 8; }

// What the ops' arguments say.
struct Shape {
  int64_t batch;
  int height, width;
  int heads, split, value_dim, key_dim, window;  // split = C / heads
  int kernel_sizes[kMaxHeads];

  VITKERNELS_HD int channels() const { return heads * split; }
  VITKERNELS_HD int tokens() const { return window * window; }
  VITKERNELS_HD int row_blocks() const { return blocks_of(tokens()); }
  VITKERNELS_HD int rows() const { return padded(tokens()); }
  VITKERNELS_HD int qkv_rows() const { return 2 * key_dim + value_dim; }
  // One head's columns in the token buffers: its split of x, later its output.
  VITKERNELS_HD int head_columns() const { return padded(max_of(split, value_dim)); }
  VITKERNELS_HD int64_t window_rows() const { return (height + window - 1) / window; }
  VITKERNELS_HD int64_t window_columns() const { return (width + window - 1) / window; }
  VITKERNELS_HD int64_t windows() const { return batch * window_rows() * window_columns(); }
};

// --- windows, tokens, pixels ------------------------------------------------------------------------------------------------------------

// The pixel of a window's token 0.
struct Corner {
  int64_t image;
  int row, column;
};

VITKERNELS_HD Corner corner_of(const Shape& shape, int64_t window) {
  const int64_t columns = shape.window_columns(), in_image = window % (shape.window_rows() * columns);
  return {
      window / (shape.window_rows() * columns), static_cast<int>(in_image / columns) * shape.window,
      static_cast<int>(in_image % columns) * shape.window};
}

// A token's row and column in its window, in one int.
VITKERNELS_HD int place_of(int token, int window) { return token / window << 8 | token % window; }
VITKERNELS_HD int row_of(int place) { return place >> 8; }
VITKERNELS_HD int column_of(int place) { return place & 0xff; }

// Whether a token is a pixel of the map; the others fill the window up with zeros.
VITKERNELS_HD bool is_pixel(const Shape& shape, const Corner& corner, int place) {
  return corner.row + row_of(place) < shape.height && corner.column + column_of(place) < shape.width;
}

// The entry of the bias table that two tokens use.
VITKERNELS_HD int bias_entry(int place, int other, int window) {
  const int dy = row_of(place) - row_of(other), dx = column_of(place) - column_of(other);
  return (dy < 0 ? -dy : dy) * window + (dx < 0 ? -dx : dx);
}

// --- rows of the qkv projection -----------------------------------------------------------------------------------------------------------

// q, k and v are each padded to a multiple of 16 columns. The row of qkv_weight that padded column n is, or -1.
VITKERNELS_HD int qkv_row(const Shape& shape, int n) {
  const int keys = padded(shape.key_dim);
  if (n < keys) return n < shape.key_dim ? n : -1;
  if (n < 2 * keys) return n - keys < shape.key_dim ? shape.key_dim + n - keys : -1;
  return n - 2 * keys < shape.value_dim ? 2 * shape.key_dim + n - 2 * keys : -1;
}
VITKERNELS_HD int qkv_columns(const Shape& shape) { return 2 * padded(shape.key_dim) + padded(shape.value_dim); }

// --- depthwise convolution ------------------------------------------------------------------------------------------------------------------

// How far a tap of head i's k x k kernel can lie from the centre and still be in the window.
VITKERNELS_HD int reach_of(const Shape& shape, int head) { return min_of(shape.kernel_sizes[head] / 2, shape.window - 1); }
VITKERNELS_HD int reach_of(const Shape& shape) {
  int reach = 0;
  for (int head = 0; head < shape.heads; ++head) reach = max_of(reach, reach_of(shape, head));
  return reach;
}
// Head i's first element in the flat dw_weight.
VITKERNELS_HD int64_t dw_offset(const Shape& shape, int head) {
  int64_t offset = 0;
  for (int i = 0; i < head; ++i) offset += static_cast<int64_t>(shape.key_dim) * shape.kernel_sizes[i] * shape.kernel_sizes[i];
  return offset;
}

// --- fragments ------------------------------------------------------------------------------------------------------------------------------

// What a lane holds of the operands of a 16 x 8 x 16 product: pairs of neighbours in depth (k), two neighbours in a row of the result.
// Of A (rows x depth) pairs 0 to 3, of B (depth x columns) pairs 0 and 1, of the result elements 0 to 3.
VITKERNELS_HD int a_row(int lane, int pair) { return (lane >> 2) + 8 * (pair & 1); }
VITKERNELS_HD int a_depth(int lane, int pair) { return 2 * (lane & 3) + 8 * (pair >> 1); }
VITKERNELS_HD int b_column(int lane) { return lane >> 2; }
VITKERNELS_HD int b_depth(int lane, int pair) { return 2 * (lane & 3) + 8 * pair; }
VITKERNELS_HD int c_row(int lane, int element) { return (lane >> 2) + 8 * (element >> 1); }
VITKERNELS_HD int c_column(int lane, int element) { return 2 * (lane & 3) + (element & 1); }

// --- work of a block's warps ----------------------------------------------------------------------------------------------------------------

// A product of row_blocks x column_blocks tiles is cut into column_blocks * parts items. An item has one column block and every parts-th row block,
// at most limit of them: what a warp loads of B serves them all. More parts than that needs only where there are fewer items than warps.
VITKERNELS_HD int row_parts(int row_blocks, int column_blocks, int limit) {
  const int least = (row_blocks + limit - 1) / limit, busy = kWarps / max_of(column_blocks, 1);
  return max_of(least, min_of(busy, row_blocks));
}

// Row blocks that an item of a product over all tokens accumulates in registers, in a kernel for windows of up to row_blocks.
VITKERNELS_HD int product_blocks(int row_blocks) { return min_of(row_blocks, 7); }

// An attention item has 16 queries and every parts-th column block of the values; the scores are computed again by each part.
VITKERNELS_HD int value_parts(int row_blocks, int value_blocks) { return max_of(1, min_of(kWarps / row_blocks, value_blocks)); }

// --- memory of a block ----------------------------------------------------------------------------------------------------------------------

// A matrix in the block's shared memory or, where that is full, in its part of the workspace in global memory (which stays in the L2 cache).
struct Matrix {
  int64_t offset;  // in bytes
  int stride;      // elements from row to row
  bool shared;
};

// Hands out memory, shared memory first.
class Arena {
 public:
  VITKERNELS_HD explicit Arena(int64_t limit) : limit_(limit) {}

  VITKERNELS_HD Matrix place(int64_t rows, int stride, int64_t element_size) {
    const int64_t bytes = (rows * stride * element_size + 15) / 16 * 16;
    if (shared_ + bytes <= limit_) {
      shared_ += bytes;
      return {shared_ - bytes, stride, true};
    }
    workspace_ += bytes;
    return {workspace_ - bytes, stride, false};
  }
  // What is in use where this arena and another, which went on from the same state, are used one after the other.
  VITKERNELS_HD Arena joined(const Arena& other) const {
    Arena both = *this;
    both.shared_ = shared_ > other.shared_ ? shared_ : other.shared_;
    both.workspace_ = workspace_ > other.workspace_ ? workspace_ : other.workspace_;
    return both;
  }
  VITKERNELS_HD int64_t shared() const { return shared_; }
  VITKERNELS_HD int64_t workspace() const { return workspace_; }

 private:
  int64_t limit_, shared_ = 0, workspace_ = 0;
};

// What both kernels need for one head: N = rows(), K and D padded. Placed in the order of use, the most used first.
struct HeadLayout {
  Matrix places;  // [N] int, place_of each token
  Matrix bias;    // [w * w] float, the head's table
  Matrix q;       // [N, K] after the depthwise convolution
  Matrix k;       // [N, K]
  Matrix v;       // [D, N], transposed: a product over tokens reads neighbours
  Matrix q_raw;   // [N, K] before the depthwise convolution
  Matrix taps;    // [(2 reach + 1)^2, K] the depthwise weights within reach
};

VITKERNELS_HD HeadLayout place_head(Arena& arena, const Shape& shape, int64_t element_size) {
  const int keys = row_stride(shape.key_dim), rows = shape.rows(), side = 2 * reach_of(shape) + 1;
  HeadLayout head{};
  head.places = arena.place(rows, 1, sizeof(int));
  head.bias = arena.place(shape.tokens(), 1, sizeof(float));
  head.q = arena.place(rows, keys, element_size);
  head.k = arena.place(rows, keys, element_size);
  head.v = arena.place(padded(shape.value_dim), row_stride(rows), element_size);
  head.q_raw = arena.place(rows, keys, element_size);
  head.taps = arena.place(side * side, padded(shape.key_dim), element_size);
  return head;
}

struct ForwardLayout {
  HeadLayout head;
  // [N, heads * head_columns()]: the window's pixels. Head i reads its columns and puts its output, after ReLU, in their place.
  Matrix tokens;
  int64_t shared_bytes, workspace_bytes;
};

VITKERNELS_HD ForwardLayout forward_layout(const Shape& shape, int64_t element_size, int64_t limit) {
  Arena arena(limit);
  ForwardLayout layout{};
  layout.head = place_head(arena, shape, element_size);
  layout.tokens = arena.place(shape.rows(), row_stride(shape.heads * shape.head_columns()), element_size);
  layout.shared_bytes = arena.shared();
  layout.workspace_bytes = arena.workspace();
  return layout;
}

struct BackwardLayout {
  HeadLayout head;
  Matrix inputs;    // [N, heads * head_columns()]: what each head projected, the sum of its split and the output before it
  Matrix outputs;   // [N, heads * head_columns()]: of each head, after ReLU
  Matrix gradient;  // [N, heads * head_columns()]: of each head's output
  // Used first:
  Matrix grad_y;  // [N, C]
  // and, in the same memory, when grad_y has become gradient:
  Matrix weights;   // [N, N] softmax
  Matrix scores;    // [N, N] gradient of the scores
  Matrix grad_q;    // [N, K] of q after the depthwise convolution
  Matrix grad_qkv;  // [N, qkv_columns()]
  int64_t shared_bytes, workspace_bytes;
};

VITKERNELS_HD BackwardLayout backward_layout(const Shape& shape, int64_t element_size, int64_t limit) {
  Arena arena(limit);
  const int rows = shape.rows(), stride = row_stride(shape.heads * shape.head_columns());
  BackwardLayout layout{};
  layout.head = place_head(arena, shape, element_size);
  Arena first = arena;
  layout.weights = arena.place(rows, row_stride(rows), element_size);
  layout.scores = arena.place(rows, row_stride(rows), element_size);
  layout.grad_q = arena.place(rows, row_stride(shape.key_dim), element_size);
  layout.grad_qkv = arena.place(rows, row_stride(qkv_columns(shape)), element_size);
  layout.grad_y = first.place(rows, row_stride(shape.channels()), element_size);
  arena = arena.joined(first);
  layout.gradient = arena.place(rows, stride, element_size);
  layout.inputs = arena.place(rows, stride, element_size);
  layout.outputs = arena.place(rows, stride, element_size);
  layout.shared_bytes = arena.shared();
  layout.workspace_bytes = arena.workspace();
  return layout;
}

// --- variants -------------------------------------------------------------------------------------------------------------------------------

// The compiled forms of each kernel: windows of up to 4 x 4 and up to 8 x 8 with all memory shared, and any window with memory anywhere.
enum class Variant { kWindow4, kWindow8, kAnywhere };

VITKERNELS_HD Variant variant_of(const Shape& shape, int64_t workspace_bytes) {
  if (workspace_bytes > 0 || shape.row_blocks() > 4) return Variant::kAnywhere;
  return shape.row_blocks() == 1 ? Variant::kWindow4 : Variant::kWindow8;
}

// --- gradients of the weights ---------------------------------------------------------------------------------------------------------------

// All gradients of the weights in one row of floats: the start of each.
struct GradientOffsets {
  int64_t qkv, qkv_bias, dw, dw_bias, table, proj, proj_bias, total;
};

VITKERNELS_HD GradientOffsets gradient_offsets(const Shape& shape) {
  const int64_t heads = shape.heads, rows = shape.qkv_rows();
  GradientOffsets at{};
  at.qkv_bias = heads * rows * shape.split;
  at.dw = at.qkv_bias + heads * rows;
  at.dw_bias = at.dw + dw_offset(shape, shape.heads);
  at.table = at.dw_bias + heads * shape.key_dim;
  at.proj = at.table + heads * shape.tokens();
  at.proj_bias = at.proj + shape.channels() * heads * shape.value_dim;
  at.total = at.proj_bias + shape.channels();
  return at;
}

}  // namespace vitkernels::cascaded_group::cuda
