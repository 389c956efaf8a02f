// The schedule of the CUDA kernels (csrc/cascaded_group/schedule.h) against brute force: every index map is a bijection onto what it should cover,
// and every buffer of every EfficientViT stage fits its GPU.
#include "cascaded_group/schedule.h"

#include <cstdlib>
#include <initializer_list>
#include <set>
#include <utility>
#include <vector>

#include "check.h"

namespace vitkernels::test {
namespace {

using namespace vitkernels::cascaded_group::cuda;

Shape shape_of(
    int64_t batch, int height, int width, int heads, int split, int value_dim, int key_dim, int window, const std::vector<int>& kernel_sizes) {
  Shape shape{batch, height, width, heads, split, value_dim, key_dim, window, {}};
  for (int i = 0; i < heads; ++i) shape.kernel_sizes[i] = kernel_sizes[i];
  return shape;
}

// The windows' pixels: each of the map exactly once, none beyond it, and only the tokens that fill a window up left over.
void check_windows(int64_t batch, int height, int width, int window) {
  const Shape shape = shape_of(batch, height, width, 1, 1, 1, 1, window, {1});
  std::vector<int> visits(static_cast<size_t>(batch) * height * width);
  int64_t padding = 0;
  for (int64_t index = 0; index < shape.windows(); ++index) {
    const Corner corner = corner_of(shape, index);
    for (int token = 0; token < shape.tokens(); ++token) {
      const int place = place_of(token, window), row = corner.row + row_of(place), column = corner.column + column_of(place);
      CHECK(row_of(place) == token / window && column_of(place) == token % window, "token %d of a %d window", token, window);
      const bool inside = row < height && column < width;
      CHECK(is_pixel(shape, corner, place) == inside, "window %ld token %d of %dx%d", long(index), token, height, width);
      if (inside) {
        ++visits[(corner.image * height + row) * width + column];
      } else {
        ++padding;
      }
    }
  }
  for (const int count : visits) CHECK(count == 1, "a pixel of %dx%d is in %d windows of %d", height, width, count, window);
  const int64_t all = int64_t{1} * batch * ((height + window - 1) / window) * ((width + window - 1) / window) * window * window;
  CHECK(padding == all - batch * height * width, "%ld padding tokens", long(padding));
}

void check_large_batch() {
  const Shape shape = shape_of(int64_t{1} << 33, 14, 21, 1, 1, 1, 1, 7, {1});
  const Corner corner = corner_of(shape, 6 * ((int64_t{1} << 33) - 1) + 4);
  CHECK(shape.windows() == 6 * (int64_t{1} << 33), "%ld windows", long(shape.windows()));
  CHECK(
      corner.image == (int64_t{1} << 33) - 1 && corner.row == 7 && corner.column == 7, "image %ld, %d, %d", long(corner.image), corner.row,
      corner.column);
}

void check_bias_entries(int window) {
  for (int i = 0; i < window * window; ++i) {
    for (int j = 0; j < window * window; ++j) {
      const int want = std::abs(i / window - j / window) * window + std::abs(i % window - j % window);
      CHECK(bias_entry(place_of(i, window), place_of(j, window), window) == want, "tokens %d, %d of a %d window", i, j, window);
    }
  }
}

// Padded columns of the qkv projection: each row of the weight once, in order, and nothing else.
void check_qkv_rows(int key_dim, int value_dim) {
  const Shape shape = shape_of(1, 1, 1, 1, 1, value_dim, key_dim, 1, {1});
  int next = 0;
  for (int column = 0; column < qkv_columns(shape); ++column) {
    const int row = qkv_row(shape, column), keys = padded(key_dim), part = column < keys ? 0 : column < 2 * keys ? 1 : 2;
    const int in_part = column - part * keys, size = part == 2 ? value_dim : key_dim;
    if (in_part < size) {
      CHECK(row == next++, "column %d of key_dim %d, d %d is row %d", column, key_dim, value_dim, row);
    } else {
      CHECK(row == -1, "column %d of key_dim %d, d %d is row %d", column, key_dim, value_dim, row);
    }
  }
  CHECK(next == shape.qkv_rows() && qkv_columns(shape) % kTile == 0, "%d of %d rows", next, shape.qkv_rows());
}

// Each element of each operand is held by exactly one lane (of the result: written once).
void check_fragments() {
  std::set<std::pair<int, int>> a, b, c;
  for (int lane = 0; lane < 32; ++lane) {
    for (int pair = 0; pair < 4; ++pair) {
      for (int i = 0; i < 2; ++i)
        CHECK(a.emplace(a_row(lane, pair), a_depth(lane, pair) + i).second, "lane %d pair %d of A is held twice", lane, pair);
    }
    for (int pair = 0; pair < 2; ++pair) {
      for (int i = 0; i < 2; ++i) CHECK(b.emplace(b_depth(lane, pair) + i, b_column(lane)).second, "lane %d pair %d of B is held twice", lane, pair);
    }
    for (int e = 0; e < 4; ++e) CHECK(c.emplace(c_row(lane, e), c_column(lane, e)).second, "lane %d element %d of C is held twice", lane, e);
    // A row of scores becomes a row of the next product's A without leaving the lane: pair p of a 16-deep step is elements 2 (p & 1) and the next of
    // result p >> 1.
    for (int pair = 0; pair < 4; ++pair) {
      const int element = 2 * (pair & 1);
      CHECK(
          a_row(lane, pair) == c_row(lane, element) && a_depth(lane, pair) == 8 * (pair >> 1) + c_column(lane, element), "lane %d pair %d", lane,
          pair);
    }
  }
  const auto covers = [](const std::set<std::pair<int, int>>& held, int rows, int columns) {
    return held.size() == static_cast<size_t>(rows * columns) && held.begin()->first == 0 && held.rbegin()->first == rows - 1 &&
           held.begin()->second == 0;
  };
  CHECK(covers(a, 16, 16) && covers(b, 16, 8) && covers(c, 16, 8), "%zu, %zu, %zu elements", a.size(), b.size(), c.size());
}

// A warp's fragment load is free of bank conflicts whatever the matrix: 32-bit loads of a warp, 64-bit loads of a half warp.
void check_banks() {
  for (int columns = 1; columns <= 512; ++columns) {
    for (const int bytes : {2, 4}) {
      const int lanes = bytes == 2 ? 32 : 16, words = 2 * bytes / 4;
      for (int half = 0; half < 32 / lanes; ++half) {
        std::set<int> banks;
        for (int lane = half * lanes; lane < (half + 1) * lanes; ++lane) {
          const int first = (a_row(lane, 0) * row_stride(columns) + a_depth(lane, 0)) * bytes / 4;
          for (int word = 0; word < words; ++word)
            CHECK(banks.insert((first + word) % 32).second, "%d columns of %d bytes, lane %d", columns, bytes, lane);
        }
      }
      CHECK(row_stride(columns) * bytes % (2 * bytes) == 0, "pairs of a row of %d are not aligned", columns);
    }
  }
}

// Items of a product: every tile once, at most `limit` row blocks in one item.
void check_items() {
  for (int row_blocks = 1; row_blocks <= 24; ++row_blocks) {
    for (int column_blocks = 1; column_blocks <= 24; ++column_blocks) {
      for (const int limit : {1, 4, product_blocks(kMaxRowBlocks)}) {
        const int parts = row_parts(row_blocks, column_blocks, limit);
        std::set<std::pair<int, int>> tiles;
        for (int item = 0; item < column_blocks * parts; ++item) {
          int count = 0;
          for (int row = item % parts; row < row_blocks; row += parts, ++count) CHECK(tiles.emplace(row, item / parts).second, "a tile twice");
          CHECK(count >= 1 && count <= limit, "%d row blocks in an item, limit %d", count, limit);
        }
        CHECK(tiles.size() == static_cast<size_t>(row_blocks * column_blocks), "%zu of %d tiles", tiles.size(), row_blocks * column_blocks);
      }
      const int parts = value_parts(row_blocks, column_blocks);
      std::set<std::pair<int, int>> tiles;
      for (int item = 0; item < row_blocks * parts; ++item) {
        for (int block = item / row_blocks; block < column_blocks; block += parts)
          CHECK(tiles.emplace(item % row_blocks, block).second, "a value tile twice");
      }
      CHECK(tiles.size() == static_cast<size_t>(row_blocks * column_blocks), "%zu of %d value tiles", tiles.size(), row_blocks * column_blocks);
    }
  }
}

struct Extent {
  Matrix matrix;
  int64_t rows, element_size;
  int64_t end() const { return matrix.offset + rows * matrix.stride * element_size; }
};

// Buffers that live at the same time do not overlap, lie where they say and are aligned for a pair.
void check_extents(const std::vector<Extent>& extents, int64_t shared_bytes, int64_t workspace_bytes) {
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& a = extents[i];
    CHECK(a.matrix.offset % 16 == 0 && a.matrix.offset >= 0, "offset %ld", long(a.matrix.offset));
    CHECK(a.end() <= (a.matrix.shared ? shared_bytes : workspace_bytes), "buffer %zu ends at %ld", i, long(a.end()));
    for (size_t j = 0; j < i; ++j) {
      const Extent& b = extents[j];
      CHECK(a.matrix.shared != b.matrix.shared || a.end() <= b.matrix.offset || b.end() <= a.matrix.offset, "buffers %zu and %zu overlap", j, i);
    }
  }
}

void check_layouts(const Shape& shape, int64_t element_size, int64_t limit) {
  const int rows = shape.rows(), side = 2 * reach_of(shape) + 1;
  const auto head_extents = [&](const HeadLayout& head) {
    return std::vector<Extent>{
        {head.places, rows, 4},
        {head.bias, shape.tokens(), 4},
        {head.q, rows, element_size},
        {head.k, rows, element_size},
        {head.v, padded(shape.value_dim), element_size},
        {head.q_raw, rows, element_size},
        {head.taps, side * side, element_size}};
  };
  const ForwardLayout forward = forward_layout(shape, element_size, limit);
  std::vector<Extent> extents = head_extents(forward.head);
  extents.push_back({forward.tokens, rows, element_size});
  check_extents(extents, forward.shared_bytes, forward.workspace_bytes);
  CHECK(forward.shared_bytes <= limit, "forward: %ld bytes of %ld", long(forward.shared_bytes), long(limit));

  const BackwardLayout backward = backward_layout(shape, element_size, limit);
  std::vector<Extent> always = head_extents(backward.head);
  for (const Matrix& matrix : {backward.inputs, backward.outputs, backward.gradient}) always.push_back({matrix, rows, element_size});
  std::vector<Extent> first = always, then = always;
  first.push_back({backward.grad_y, rows, element_size});
  for (const Matrix& matrix : {backward.weights, backward.scores, backward.grad_q, backward.grad_qkv}) then.push_back({matrix, rows, element_size});
  check_extents(first, backward.shared_bytes, backward.workspace_bytes);
  check_extents(then, backward.shared_bytes, backward.workspace_bytes);
  CHECK(backward.shared_bytes <= limit, "backward: %ld bytes of %ld", long(backward.shared_bytes), long(limit));
}

struct Stage {
  const char* model;
  int heads, split, window;
  std::vector<int> kernel_sizes;
};

const std::vector<Stage>& stages() {
  static const std::vector<Stage> all = {{"m0", 4, 16, 7, {5, 5, 5, 5}}, {"m0", 4, 32, 7, {5, 5, 5, 5}}, {"m0", 4, 48, 4, {5, 5, 5, 5}},
                                         {"m1", 2, 64, 7, {7, 5}},       {"m1", 3, 48, 7, {7, 5, 3}},    {"m1", 3, 64, 4, {7, 5, 3}},
                                         {"m2", 4, 32, 7, {7, 5, 3, 3}}, {"m2", 3, 64, 7, {7, 5, 3}},    {"m2", 2, 112, 4, {7, 5}},
                                         {"m3", 4, 32, 7, {5, 5, 5, 5}}, {"m3", 3, 80, 7, {5, 5, 5}},    {"m3", 4, 80, 4, {5, 5, 5, 5}},
                                         {"m4", 4, 32, 7, {7, 5, 3, 3}}, {"m4", 4, 64, 7, {7, 5, 3, 3}}, {"m4", 4, 96, 4, {7, 5, 3, 3}},
                                         {"m5", 3, 64, 7, {7, 5, 3}},    {"m5", 3, 96, 7, {7, 5, 3}},    {"m5", 4, 96, 4, {7, 5, 3, 3}}};
  return all;
}

// EfficientViT: the forward kernel keeps everything in shared memory on either GPU, in 16 bit with room for two blocks; so does the backward kernel
// in 16 bit on sm_90.
void check_stages() {
  for (const Stage& stage : stages()) {
    const Shape shape = shape_of(1, stage.window, stage.window, stage.heads, stage.split, stage.split, 16, stage.window, stage.kernel_sizes);
    for (const int64_t limit : {kSharedLimitSm80, kSharedLimitSm90}) {
      for (const int64_t element_size : {2, 4}) {
        check_layouts(shape, element_size, limit);
        const ForwardLayout forward = forward_layout(shape, element_size, limit);
        CHECK(
            forward.workspace_bytes == 0, "%s C=%d, %ld bytes an element: %ld bytes do not fit", stage.model, shape.channels(), long(element_size),
            long(forward.workspace_bytes));
        CHECK(
            element_size == 4 || 2 * (forward.shared_bytes + 1024) <= limit, "%s C=%d: %ld bytes, no second block", stage.model, shape.channels(),
            long(forward.shared_bytes));
      }
    }
    const BackwardLayout backward = backward_layout(shape, 2, kSharedLimitSm90);
    CHECK(backward.workspace_bytes == 0, "%s C=%d: backward does not fit, %ld bytes", stage.model, shape.channels(), long(backward.workspace_bytes));
  }
}

void check_variants() {
  for (int window = 1; window <= kMaxWindow; ++window) {
    const Shape shape = shape_of(1, window, window, 2, 64, 64, 16, window, {5, 3});
    CHECK(shape.row_blocks() <= kMaxRowBlocks, "window %d has %d row blocks", window, shape.row_blocks());
    const Variant want = window <= 4 ? Variant::kWindow4 : window <= 8 ? Variant::kWindow8 : Variant::kAnywhere;
    CHECK(variant_of(shape, 0) == want, "window %d", window);
    CHECK(variant_of(shape, 16) == Variant::kAnywhere, "window %d", window);
    for (const int64_t limit : {int64_t{0}, int64_t{20000}, kSharedLimitSm80, kSharedLimitSm90}) check_layouts(shape, 4, limit);
  }
}

void check_gradient_offsets() {
  const Shape shape = shape_of(1, 7, 7, 3, 48, 48, 16, 7, {7, 5, 3});
  const GradientOffsets at = gradient_offsets(shape);
  CHECK(dw_offset(shape, 0) == 0 && dw_offset(shape, 1) == 16 * 49 && dw_offset(shape, 3) == 16 * (49 + 25 + 9), "%ld", long(dw_offset(shape, 3)));
  CHECK(
      at.qkv_bias == 3 * 80 * 48 && at.dw == at.qkv_bias + 3 * 80 && at.dw_bias == at.dw + 16 * 83 && at.table == at.dw_bias + 48, "%ld",
      long(at.table));
  CHECK(at.proj == at.table + 3 * 49 && at.proj_bias == at.proj + 144 * 144 && at.total == at.proj_bias + 144, "%ld", long(at.total));
}

void run() {
  for (int window = 1; window <= kMaxWindow; ++window) {
    check_bias_entries(window);
    for (const auto& [height, width] :
         std::initializer_list<std::pair<int, int>>{{14, 14}, {14, 37}, {29, 16}, {window, window}, {window, 3 * window + 1}}) {
      if (height >= window && width >= window) check_windows(2, height, width, window);
    }
  }
  check_large_batch();
  for (const int key_dim : {1, 5, 8, 15, 16, 17, 20, 33, 64}) {
    for (const int value_dim : {1, 7, 16, 17, 32, 48, 112}) check_qkv_rows(key_dim, value_dim);
  }
  check_fragments();
  check_banks();
  check_items();
  check_stages();
  check_variants();
  check_gradient_offsets();
}

}  // namespace
}  // namespace vitkernels::test

int main() {
  vitkernels::test::run();
  return vitkernels::test::finish();
}
