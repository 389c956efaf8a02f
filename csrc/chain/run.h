// A chain of layers, a few images at a time so that their maps stay in the cache.
//
// Inside, a map is [pixels][channels padded to whole vectors], the images of a pass one after the other: a 1x1 convolution is a product with as many columns
// as channels, a depthwise one works on vectors of channels, and neither sees how large a map is or where one image ends. Workers share the pixels of a layer;
// a layer that looks at one pixel alone runs on a tile as soon as the layer before has made it.
#pragma once

#include "bottleneck/panels.h"
#include "cascaded_group/kernels.h"
#include "chain/kernels.h"
#include "common/runs.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace chain;

// Pixels of a tile: whole blocks of rows for 6 and for 8, and few enough for what is between two products to stay in the L2 cache.
constexpr int64_t kTile = 48;
// A matrix of so many bytes is worth waiting for the other workers once more, if each then reads only its part (16 rows: lost at 0.3 MB, won at 1.2 MB).
constexpr int64_t kLargeMatrix = 512 << 10;
// Of the maps of the images of a pass, in bytes.
constexpr int64_t kMaps = 4 << 20;

// Left: what the products' left operands are held as, T or, for matrices in pairs, bfloat16.
template <class S, class Left = Arith<S>>
struct Pass {
  using T = Arith<S>;
  static constexpr int64_t lanes = kLanes<T>;
  static constexpr bool kPairs = std::is_same_v<Left, BFloat16>;

  const Chain& a;

  const S* matrix(const Layer& l, int64_t i) const { return static_cast<const S*>(a.matrices) + l.matrices[i]; }
  const T* vector(const Layer& l, int64_t i) const { return static_cast<const T*>(a.vectors) + l.vectors[i]; }

  // Left operands: rows so far apart.
  struct Rows {
    const Left* data;
    int64_t row;
  };

  // epilogue(row, column, sums with their biases of the vector of columns there) for the product of `rows` rows with the panels [panels.begin, panels.end) of
  // matrix i of a layer, [depth, columns]. Epilogues hold copies, too.
  template <class Epilogue>
  void multiply(const Layer& l, int64_t i, int64_t rows, int64_t depth, int64_t columns, Rows left, Range panels, const Epilogue& epilogue) const {
    const int64_t first = panels.begin * kPanel, end = min_of(panels.end * kPanel, columns);
    if (kPairs) depth = round_up(depth, 2);
    times_panels(rows, depth, end - first, left.data, left.row, matrix(l, i) + first * depth, vector(l, i) + first, [=](int64_t row, int64_t column, Vec<T> y) {
      epilogue(row, first + column, y);
    });
  }
  static Range all(int64_t columns) { return {0, ceil_div(columns, kPanel)}; }

  // Rows of values as left operands: where they lie, or rounded to bfloat16 in `buffer`.
  static Rows as_left(const T* values, int64_t row, int64_t rows, int64_t columns, [[maybe_unused]] Left* buffer) {
    if constexpr (kPairs) {
      const int64_t target_row = left_row<Left>(columns);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; c += lanes) store_left(buffer + i * target_row + c, load(values + i * row + c));
        complete(buffer + i * target_row, columns);
      }
      return {buffer, target_row};
    } else {
      return {values, row};
    }
  }
  static int64_t as_left_size(int64_t rows, int64_t columns) { return kPairs ? rows * left_row<Left>(columns) : 0; }
  // Half a pair is multiplied with zero, and must not be a NaN.
  static void complete([[maybe_unused]] Left* row, [[maybe_unused]] int64_t columns) {
    if constexpr (kPairs) {
      if (columns % 2 != 0) row[columns] = {0};
    }
  }

  // body(first, count) for tiles of [0, rows), each worker's neighbours.
  template <class Body>
  static void by_tiles(int64_t rows, const Body& body) {
    const int64_t blocks = ceil_div(rows, kBlockRows), workers = min_of(num_threads(), blocks);
    parallel(workers, [&](int64_t worker) {
      const Range own = share(blocks, worker, workers);
      const int64_t end = min_of(own.end * kBlockRows, rows);
      for (int64_t first = own.begin * kBlockRows; first < end; first += kTile) body(first, min_of(kTile, end - first));
    });
  }

  // --- between tensors and maps -------------------------------------------------------------------------------------------------------

  // body(data of the first pixel, pixels, stride, number of the pixel in the pass) for runs of equally spaced pixels of `images` images of a map.
  template <class Body>
  static void by_runs(const Map& map, int64_t first_image, int64_t images, int64_t height, int64_t width, const Body& body) {
    const int64_t pixels = height * width, blocks = ceil_div(images * pixels, kAlign), workers = min_of(num_threads(), blocks);
    const bool flat = height == 1 || width == 1 || map.height_stride == width * map.width_stride;
    parallel(workers, [&](int64_t worker) {
      const Range own = share(blocks, worker, workers);
      for (int64_t at = own.begin * kAlign; at < min_of(own.end * kAlign, images * pixels);) {
        const int64_t pixel = at % pixels, left = min_of(own.end * kAlign, images * pixels) - at;
        const int64_t count = min_of(left, flat ? pixels - pixel : width - pixel % width);
        S* data = static_cast<S*>(map.data) + (first_image + at / pixels) * map.batch_stride + pixel / width * map.height_stride + pixel % width * map.width_stride;
        body(data, count, width == 1 ? map.height_stride : map.width_stride, at);
        at += count;
      }
    });
  }

  void read_maps(int64_t first, int64_t images, T* out) const {
    const Layer& l = a.layers[0];
    const int64_t channels = l.channels, row = l.row;
    by_runs(a.x, first, images, l.height, l.width, [&](const S* data, int64_t count, int64_t stride, int64_t at) {
      load_run(data, a.x.dim_stride, stride, count, {1, channels, round_up(channels, lanes), row}, out + at * row);
    });
  }

  void write_maps(int64_t first, int64_t images, const T* in) const {
    const Layer& l = a.layers[a.count - 1];
    by_runs(a.y, first, images, l.out_height, l.out_width, [&](S* data, int64_t count, int64_t stride, int64_t at) {
      store_run(data, a.y.dim_stride, stride, count, {1, l.out_channels, round_up(l.out_channels, lanes), l.out_row}, in + at * l.out_row);
    });
  }

  // --- an image -----------------------------------------------------------------------------------------------------------------------------

  // A first convolution of few channels, from the tensor itself: pixels are the lanes here, and lie so in it as a rule. With the pixels of a line apart by what is
  // left of their number after the stride, every tap of neighbouring outputs is a run, and the taps of two vectors of outputs make the right operand of a product
  // with the weight.
  void image(const Layer& l, int64_t first_image, int64_t images, T* out) const {
    const int64_t lines = images * l.out_height, workers = min_of(num_threads(), lines), depth = Pass::depth(l), taps = l.channels * l.kernel;
    const int64_t length = round_up(l.out_width, lanes) + round_up(ceil_div(l.kernel, l.stride), lanes), line_size = l.stride * length;
    constexpr int64_t step = 2 * lanes;
    parallel(workers, [&](int64_t worker) {
      Buffer<T> padded(line_size + l.width + l.padding + lanes), split(taps * line_size), panel(depth * step), sums(l.out_channels * step);
      std::memset(padded, 0, static_cast<size_t>(line_size + l.width + l.padding + lanes) * sizeof(T));
      const Range own = share(lines, worker, workers);
      for (int64_t line = own.begin; line < own.end; ++line) {
        const int64_t top = line % l.out_height * l.stride - l.padding;
        const S* source = static_cast<const S*>(a.x.data) + (first_image + line / l.out_height) * a.x.batch_stride;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t y = top + tap % l.kernel;
          if (y < 0 || y >= l.height) {
            std::memset(split + tap * line_size, 0, static_cast<size_t>(line_size) * sizeof(T));
          } else {
            split_line(l, source + tap / l.kernel * a.x.dim_stride + y * a.x.height_stride, length, padded, split + tap * line_size);
          }
        }
        for (int64_t x = 0; x < l.out_width; x += step) {
          const int64_t count = min_of(step, l.out_width - x), vectors = ceil_div(count, lanes);
          T* target = panel;
          for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t dx = 0; dx < l.kernel; ++dx, target += step) {
              const T* run = split + tap * line_size + dx % l.stride * length + dx / l.stride + x;
              for (int64_t v = 0; v < vectors; ++v) store(target + v * lanes, load(run + v * lanes));
            }
          }
          gemm_in_parts(l.out_channels, depth, vectors, vector(l, 1), depth, panel.get(), step,
                        [sums = sums.get(), bias = vector(l, 0), relu_too = l.relu](int64_t channel, int64_t v, Vec<T> acc) {
                          const Vec<T> y = acc + bias[channel];
                          store(sums + (2 * channel + v) * lanes, relu_too ? relu(y) : y);
                        });
          load_run(sums.get(), step, 1, count, {1, l.out_channels, round_up(l.out_channels, lanes), l.out_row}, out + (line * l.out_width + x) * l.out_row);
        }
      }
    });
  }

  // A line between its padding as l.stride runs of `length`, pixel i at i / l.stride of run i % l.stride. `padded`: zeros, but for the line that was here before.
  void split_line(const Layer& l, const S* line, int64_t length, T* padded, T* runs) const {
    T* values = padded + l.padding;
    const int64_t stride = a.x.width_stride;
    if (stride == 1) {
      int64_t i = 0;
      for (; i + lanes <= l.width; i += lanes) store(values + i, load(line + i));
      if (i < l.width) store(values + i, load_partial(line + i, l.width - i));
    } else {
      for (int64_t i = 0; i < l.width; ++i) values[i] = to_float(line[i * stride]);
    }
    if (l.stride == 2) {
      constexpr IndexVec<T> even = make_index<T>([](int i) { return 2 * i; }), odd = make_index<T>([](int i) { return 2 * i + 1; });
      for (int64_t i = 0; i < length; i += lanes) {
        const Vec<T> low = load(padded + 2 * i), high = load(padded + 2 * i + lanes);
        store(runs + i, shuffle(low, high, even));
        store(runs + length + i, shuffle(low, high, odd));
      }
    } else {
      for (int64_t run = 0; run < l.stride; ++run) {
        for (int64_t i = 0; i < length; ++i) runs[run * length + i] = padded[i * l.stride + run];
      }
    }
  }

  // --- layers that slide over the map, for output pixels [first, first + count) -----------------------------------------------------------

  // One output pixel's window: the taps [top, bottom) x [left, right) lie in the map, the others are zero padding.
  struct Field {
    int64_t top, bottom, left, right;
    const T* corner;  // of tap (0, 0), which may lie outside

    bool inside(int64_t kernel) const { return top == 0 && left == 0 && bottom == kernel && right == kernel; }
  };

  // body(i, field) for output pixels first + i, i in [0, count), line by line.
  template <class Body>
  static void by_fields(const Layer& l, const T* in, int64_t first, int64_t count, const Body& body) {
    for (int64_t i = 0; i < count;) {
      const int64_t line = (first + i) / l.out_width, column = (first + i) % l.out_width, end = min_of(count, i + l.out_width - column);
      const int64_t y = line % l.out_height * l.stride - l.padding;
      const T* start = in + (line / l.out_height * l.height + y) * l.width * l.row;
      Field field{max_of<int64_t>(-y, 0), min_of(l.height - y, l.kernel), 0, 0, nullptr};
      for (int64_t x = column * l.stride - l.padding; i < end; ++i, x += l.stride) {
        field.left = max_of<int64_t>(-x, 0), field.right = min_of(l.width - x, l.kernel), field.corner = start + x * l.row;
        body(i, field);
      }
    }
  }

  // Whole vectors: what is read and written too much is overwritten by what follows, or lies in the slack behind.
  static Left* copy(const T* source, int64_t count, Left* target) {
    for (int64_t i = 0; i < count; i += lanes) store_left(target + i, load(source + i));
    return target + count;
  }
  static Left* clear(int64_t count, Left* target) {
    for (int64_t i = 0; i < count; i += lanes) store_left(target + i, Vec<T>{});
    return target + count;
  }
  static int64_t depth(const Layer& l) { return l.kernel * l.kernel * l.channels; }
  static int64_t patch_row(const Layer& l) { return left_row<Left>(depth(l)); }

  // The windows of some pixels as rows [dy][dx][channel].
  static void gather(const Layer& l, const T* in, int64_t first, int64_t count, Left* patches) {
    const int64_t channels = l.channels, line = l.kernel * channels;
    const auto taps = [&](const T* source, int64_t number, Left* target) {
      if (l.row == channels) return copy(source, number * channels, target);
      for (int64_t dx = 0; dx < number; ++dx) target = copy(source + dx * l.row, channels, target);
      return target;
    };
    by_fields(l, in, first, count, [&](int64_t i, const Field& field) {
      Left* target = patches + i * patch_row(l);
      const T* source = field.corner;
      const bool inside = field.inside(l.kernel);
      for (int64_t dy = 0; dy < l.kernel; ++dy, source += l.width * l.row) {
        if (inside) {
          target = taps(source, l.kernel, target);
        } else if (dy < field.top || dy >= field.bottom || field.left >= field.right) {
          target = clear(line, target);
        } else {
          target = clear(field.left * channels, target);
          target = taps(source + field.left * l.row, field.right - field.left, target);
          target = clear((l.kernel - field.right) * channels, target);
        }
      }
      complete(patches + i * patch_row(l), depth(l));
    });
  }

  static bool direct(const Layer& l) { return l.kernel == 1 && l.stride == 1 && l.padding == 0; }

  void convolve(const Layer& l, const T* in, T* out, int64_t first, int64_t count, Range panels) const {
    const bool direct = Pass::direct(l);
    Buffer<Left> patches(direct ? as_left_size(count, l.channels) : count * patch_row(l) + kAlign);
    Rows left{patches, patch_row(l)};
    if (direct) {
      left = as_left(in + first * l.row, l.row, count, l.channels, patches);
    } else {
      gather(l, in, first, count, patches);
    }
    multiply(l, 0, count, depth(l), l.out_channels, left, panels,
             [relu_too = l.relu, out = out + first * l.out_row, out_row = l.out_row, added = l.residual ? in + first * l.row : nullptr, in_row = l.row](
                 int64_t row, int64_t column, Vec<T> y) {
               if (relu_too) y = relu(y);
               if (added) y += load(added + row * in_row + column);
               store(out + row * out_row + column, y);
             });
  }

  // One pixel of a depthwise convolution, kVectors vectors of channels from c on.
  template <int kVectors>
  void depthwise_pixel(const Layer& l, const Field& field, const T* input, T* output, int64_t c) const {
    const T *taps = vector(l, 0) + c, *bias = vector(l, 1) + c;
    Vec<T> acc[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[j] = load(bias + j * lanes);
    for (int64_t dy = field.top; dy < field.bottom; ++dy) {
      for (int64_t dx = field.left; dx < field.right; ++dx) {
        const T *weight = taps + (dy * l.kernel + dx) * l.row, *pixel = field.corner + (dy * l.width + dx) * l.row + c;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[j] += load(weight + j * lanes) * load(pixel + j * lanes);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vec<T> y = l.relu ? relu(acc[j]) : acc[j];
      if (l.residual) y += load(input + c + j * lanes);
      store(output + c + j * lanes, y);
    }
  }

  void depthwise(const Layer& l, const T* in, T* out, int64_t first, int64_t count) const {
    by_fields(l, in, first, count, [&](int64_t i, const Field& field) {
      const T* input = in + (first + i) * l.row;
      T* output = out + (first + i) * l.out_row;
      int64_t c = 0;
      for (; c + 4 * lanes <= l.row; c += 4 * lanes) depthwise_pixel<4>(l, field, input, output, c);
      for (; c < l.row; c += lanes) depthwise_pixel<1>(l, field, input, output, c);
    });
  }

  // --- layers that work in place ----------------------------------------------------------------------------------------------------------

  // Rows of x through the first matrix of a feed-forward layer, and on through the second, for some panels of each.
  void expand(const Layer& l, Rows x, int64_t rows, Left* hidden, Range panels) const {
    multiply(l, 0, rows, l.channels, l.hidden, x, panels, [hidden, hidden_row = left_row<Left>(l.hidden)](int64_t row, int64_t column, Vec<T> y) {
      store_left(hidden + row * hidden_row + column, relu(y));
    });
  }
  void reduce(const Layer& l, const Left* hidden, int64_t rows, T* x, Range panels) const {
    multiply(l, 1, rows, l.hidden, l.channels, {hidden, left_row<Left>(l.hidden)}, panels,
             [x, x_row = l.row, residual = l.residual](int64_t row, int64_t column, Vec<T> y) {
               T* target = x + row * x_row + column;
               store(target, residual ? y + load(target) : y);
             });
  }

  void feed_forward(const Layer& l, T* map, int64_t first, int64_t count) const {
    Buffer<Left> x(as_left_size(count, l.channels)), hidden(count * left_row<Left>(l.hidden));
    map += first * l.row;
    expand(l, as_left(map, l.row, count, l.channels, x), count, hidden, all(l.hidden));
    reduce(l, hidden, count, map, all(l.channels));
  }

  // body(panels) for shares of a matrix's panels, for products of too few rows to share these.
  template <class Body>
  static void by_panels(int64_t columns, const Body& body) {
    const int64_t panels = ceil_div(columns, kPanel), workers = min_of(num_threads(), panels);
    parallel(workers, [&](int64_t worker) { body(share(panels, worker, workers)); });
  }

  // Whether workers share a matrix by its columns and not by the rows of what it is multiplied with. Of few rows each has a block or two, and would read all
  // of a large matrix for that, from beyond its own cache.
  static bool shares_panels(int64_t rows, int64_t depth, int64_t columns) {
    const int64_t blocks = ceil_div(rows, kBlockRows), panels = ceil_div(columns, kPanel), workers = num_threads();
    const int64_t worth = blocks < workers ? kLargeMatrix / 8 : kLargeMatrix;  // some would have nothing to do
    return workers > 1 && blocks <= 2 * workers && depth * columns * static_cast<int64_t>(sizeof(S)) >= worth &&
           blocks * ceil_div(panels, workers) <= ceil_div(blocks, workers) * panels;
  }
  static bool feeds_by_panels(const Layer& l, int64_t rows) { return shares_panels(rows, l.channels, l.hidden) && shares_panels(rows, l.hidden, l.channels); }

  void feed_forward_by_panels(const Layer& l, T* map, int64_t rows) const {
    Buffer<Left> memory(as_left_size(rows, l.channels)), hidden(rows * left_row<Left>(l.hidden));
    const Rows x = as_left(map, l.row, rows, l.channels, memory);
    by_panels(l.hidden, [&](Range panels) { expand(l, x, rows, hidden, panels); });
    by_panels(l.channels, [&](Range panels) { reduce(l, hidden, rows, map, panels); });
  }

  // body(image, channel, means of the vector of channels there) for all of them.
  template <class Body>
  static void means(const Layer& l, int64_t images, const T* map, const Body& body) {
    const int64_t pixels = l.height * l.width, vectors = l.row / lanes, workers = min_of(num_threads(), images * vectors);
    parallel(workers, [&](int64_t worker) {
      const Range own = share(images * vectors, worker, workers);
      for (int64_t i = own.begin; i < own.end; ++i) {
        // Line by line: one long sum in an accumulator would round more than what it is compared with.
        const T* x = map + i / vectors * pixels * l.row + i % vectors * lanes;
        Vec<T> sum{};
        for (int64_t y = 0; y < l.height; ++y) {
          Vec<T> line{};
          for (int64_t p = y * l.width; p < (y + 1) * l.width; ++p) line += load(x + p * l.row);
          sum += line;
        }
        body(i / vectors, i % vectors * lanes, sum / static_cast<T>(pixels));
      }
    });
  }

  void pool(const Layer& l, int64_t images, const T* in, T* out) const {
    means(l, images, in, [l, out, weight = vector(l, 0), bias = vector(l, 1)](int64_t image, int64_t channel, Vec<T> y) {
      store(out + image * l.out_row + channel, y * load(weight + channel) + load(bias + channel));
    });
  }

  void squeeze_excite(const Layer& l, int64_t images, T* map) const {
    const int64_t pixels = l.height * l.width, mean_row = left_row<Left>(l.row), hidden_row = left_row<Left>(l.hidden);
    Buffer<Left> mean(images * mean_row), hidden(images * hidden_row);
    Buffer<T> gate(images * l.row);
    means(l, images, map, [&](int64_t image, int64_t channel, Vec<T> y) { store_left(mean + image * mean_row + channel, y); });
    by_panels(l.hidden, [&](Range panels) { expand(l, {mean, mean_row}, images, hidden, panels); });
    by_panels(l.channels, [&](Range panels) {
      multiply(l, 1, images, l.hidden, l.channels, {hidden, hidden_row}, panels, [gate = gate.get(), row_size = l.row](int64_t image, int64_t column, Vec<T> y) {
        store(gate + image * row_size + column, T(1) / (T(1) + exp(-y)));
      });
    });
    by_tiles(images * pixels, [&](int64_t first, int64_t count) {
      for (int64_t at = first; at < first + count; ++at) {
        T* x = map + at * l.row;
        const T* factor = gate + at / pixels * l.row;
        for (int64_t c = 0; c < l.row; c += lanes) {
          const Vec<T> old = load(x + c), product = old * load(factor + c);
          store(x + c, l.residual ? product + old : product);
        }
      }
    });
  }

  // --- attention ----------------------------------------------------------------------------------------------------------------------------

  void attend(const Layer& l, int64_t images, T* in, T* out) const {
    const int64_t split = l.channels / l.heads, rows = 2 * l.key_dim + l.value_dim;
    const auto map = [&](T* data) { return Map{data, l.height * l.width * l.row, 1, l.width * l.row, l.row}; };
    cascaded_group::Forward args{};
    args.dtype = std::is_same_v<T, double> ? Dtype::kFloat64 : Dtype::kFloat32;
    args.batch = images, args.channels = l.channels, args.height = l.height, args.width = l.width;
    args.heads = l.heads, args.key_dim = l.key_dim, args.value_dim = l.value_dim, args.window = l.window;
    args.kernel_sizes = l.kernel_sizes;
    args.scale = 1;  // it is part of the depthwise weights
    args.x = map(in), args.y = map(out), args.add = l.residual;
    args.qkv_weight = {vector(l, 0), split * rows, 1, rows};
    args.qkv_bias = vector(l, 1), args.dw_weight = vector(l, 2), args.dw_bias = vector(l, 3), args.attention_bias = vector(l, 4);
    args.proj_weight = {vector(l, 5), 0, 1, l.channels};
    args.proj_bias = vector(l, 6);
    cascaded_group_kernels().forward(args);
  }

  // --- the chain ----------------------------------------------------------------------------------------------------------------------------

  // Layers [begin, end) of the maps in `map`, which is overwritten, with two buffers to go to and fro between. Returns where the result is.
  T* layers(int64_t begin, int64_t end, int64_t images, T* map, T* first, T* second) const {
    for (int64_t i = begin; i < end; ++i) {
      const Layer& l = a.layers[i];
      T* out = map == first ? second : first;
      switch (l.kind) {
        case Kind::kConvolution:
        case Kind::kDepthwise: {
          const int64_t rows = images * l.out_height * l.out_width;
          if (l.kind == Kind::kConvolution && direct(l) && shares_panels(rows, l.channels, l.out_channels)) {
            by_panels(l.out_channels, [&](Range panels) { convolve(l, map, out, 0, rows, panels); });
            map = out;
            break;
          }
          int64_t next = i + 1;
          while (next < end && a.layers[next].kind == Kind::kFeedForward && !feeds_by_panels(a.layers[next], rows)) ++next;
          by_tiles(rows, [&](int64_t from, int64_t count) {
            l.kind == Kind::kDepthwise ? depthwise(l, map, out, from, count) : convolve(l, map, out, from, count, all(l.out_channels));
            for (int64_t j = i + 1; j < next; ++j) feed_forward(a.layers[j], out, from, count);
          });
          i = next - 1;
          map = out;
          break;
        }
        case Kind::kFeedForward:
          if (const int64_t rows = images * l.height * l.width; feeds_by_panels(l, rows)) {
            feed_forward_by_panels(l, map, rows);
          } else {
            by_tiles(rows, [&](int64_t from, int64_t count) { feed_forward(l, map, from, count); });
          }
          break;
        case Kind::kSqueezeExcite:
          squeeze_excite(l, images, map);
          break;
        case Kind::kPool:
          pool(l, images, map, out);
          map = out;
          break;
        case Kind::kImage:  // the chain has begun with it
          break;
        case Kind::kAttention:
          attend(l, images, map, l.residual ? map : out);
          if (!l.residual) map = out;
      }
    }
    return map;
  }
};

inline int64_t input_size(const Layer& l) { return l.height * l.width * l.row; }
inline int64_t output_size(const Layer& l) { return l.out_height * l.out_width * l.out_row; }

// The largest map that layer `begin` or one behind it reads or writes.
inline int64_t largest_map(const Chain& a, int64_t begin) {
  int64_t largest = input_size(a.layers[begin]);
  for (int64_t i = begin; i < a.count; ++i) largest = max_of(largest, output_size(a.layers[i]));
  return largest;
}

// Passes over all images, one for the layers up to where maps have become so small that four times as many images fit in the cache, and so on: the weights
// behind there are many, and each time they are read they should serve many pixels.
template <class Pass>
void run_passes(const Chain& a) {
  using T = typename Pass::T;
  if (a.batch == 0) return;
  const Pass pass{a};
  struct Part {
    int64_t begin, end, largest, images;
  };
  const auto part_from = [&](int64_t begin) {
    const int64_t largest = largest_map(a, begin);
    int64_t end = begin + 1;
    while (end < a.count && 4 * largest_map(a, end) > largest) ++end;
    // Equally many images each time; more than what fits where there are workers for them.
    const int64_t fit = max_of(kMaps / (2 * largest * static_cast<int64_t>(sizeof(T))), num_threads());
    return Part{begin, end, largest, ceil_div(a.batch, ceil_div(a.batch, fit))};
  };
  int64_t most = 0, between = 0;
  for (Part part = part_from(0);; part = part_from(part.end)) {
    most = max_of(most, part.images * part.largest);
    if (part.end == a.count) break;
    between = max_of(between, a.batch * output_size(a.layers[part.end - 1]));
  }
  Buffer<T> memory(2 * (most + kAlign + between + kAlign));
  T *const first = memory, *const second = first + most + kAlign;
  T *in = second + most + kAlign, *out = in + between + kAlign;
  for (Part part = part_from(0);; part = part_from(part.end)) {
    for (int64_t image = 0; image < a.batch; image += part.images) {
      const int64_t images = min_of(part.images, a.batch - image);
      T* map = part.begin == 0 ? first : in + image * input_size(a.layers[part.begin]);
      int64_t begin = part.begin;
      if (begin == 0 && a.layers[0].kind == Kind::kImage) {
        pass.image(a.layers[begin++], image, images, map);
      } else if (begin == 0) {
        pass.read_maps(image, images, map);
      }
      map = pass.layers(begin, part.end, images, map, first, second);
      if (part.end == a.count) {
        pass.write_maps(image, images, map);
      } else {
        const int64_t size = output_size(a.layers[part.end - 1]);
        std::memcpy(out + image * size, map, static_cast<size_t>(images * size) * sizeof(T));
      }
    }
    if (part.end == a.count) return;
    std::swap(in, out);
  }
}

template <class S>
void run(const Chain& a) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (a.pairs) return run_passes<Pass<S, BFloat16>>(a);
  }
#endif
  run_passes<Pass<S>>(a);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
