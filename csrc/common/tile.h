// Tiles of tokens: a few columns of a [dim, tokens] matrix, brought from a strided tensor into a dense panel [dim][columns] of the arithmetic type
// and back. The panel is where layout and dtype end: kernels see one form only.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {

// body(i) for i in [0, n) on PyTorch's pool.
template <class Body>
inline void parallel(int64_t n, const Body& body) {
  parallel_for(n, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, const_cast<Body*>(&body));
}

// The same where it is worth a second thread; else on this one alone.
template <class Body>
inline void parallel_if(bool worth, int64_t n, const Body& body) {
  if (worth) return parallel(n, body);
  for (int64_t i = 0; i < n; ++i) body(i);
}

// Contiguous share `part` of `parts` of the range [0, n).
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

// The tokens of one sample: a [dim, height, width] tensor of any strides, the pixels numbered row by row.
template <class S>
struct Tokens {
  S* data;
  int64_t dim, height, width;
  int64_t dim_stride, height_stride, width_stride;

  int64_t offset(int64_t token) const { return token / width * height_stride + token % width * width_stride; }
  int64_t token_stride() const { return width == 1 ? height_stride : width_stride; }
  // One stride serves all tokens.
  bool flat() const { return width == 1 || height == 1 || height_stride == width * width_stride; }
  // Neighbouring tokens are neighbours in memory (NCHW) ...
  bool token_major() const { return flat() && token_stride() == 1; }
  // ... or neighbouring channels are (channels_last).
  bool channel_major() const { return flat() && dim_stride == 1; }
};

// Tokens [first, first + count) as panels of `columns` tokens, one after the other: panel[i][c][t] is token first + i * columns + t of channel c. The last panel is
// filled with zeros. columns is a multiple of the lanes. Several panels a call, because reading one line of memory from each of a hundred distant channels costs
// a page walk each: a few lines in a row share it.
template <class S>
inline void load_panels(const Tokens<S>& x, int64_t first, int64_t count, Arith<S>* panels, int64_t columns) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = round_up(count, columns), panel_size = x.dim * columns;
  const auto place = [&](int64_t c, int64_t t) { return panels + t / columns * panel_size + c * columns + t % columns; };
  if (x.token_major()) {
    for (int64_t c = 0; c < x.dim; ++c) {
      const S* row = x.data + c * x.dim_stride + first;
      for (int64_t start = 0; start < padded; start += columns) {
        T* out = panels + start / columns * panel_size + c * columns;
        for (int64_t t = 0; t < columns; t += lanes) {
          const int64_t left = count - start - t;
          store(out + t, left >= lanes ? load(row + start + t) : left > 0 ? load_partial(row + start + t, left) : Vec<T>{});
        }
      }
    }
    return;
  }
  if (x.channel_major()) {
    const int64_t stride = x.token_stride();
    for (int64_t t = 0; t < padded; t += lanes) {
      const int64_t rows = min_of(max_of<int64_t>(count - t, 0), lanes);
      for (int64_t c = 0; c < x.dim; c += lanes) {
        const int64_t channels = min_of(x.dim - c, lanes);
        Vec<T> block[lanes] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const S* source = x.data + (first + t + i) * stride + c;
          block[i] = channels == lanes ? load(source) : load_partial(source, channels);
        }
        transpose<T>(block);
        for (int64_t i = 0; i < channels; ++i) store(place(c + i, t), block[i]);
      }
    }
    return;
  }
  for (int64_t t = 0; t < padded; ++t) {
    const int64_t offset = t < count ? x.offset(first + t) : 0;
    for (int64_t c = 0; c < x.dim; ++c) *place(c, t) = t < count ? to_float(x.data[c * x.dim_stride + offset]) : T(0);
  }
}

// The inverse: tokens [first, first + count) of every channel from panels.
template <class S>
inline void store_panels(const Tokens<S>& y, int64_t first, int64_t count, const Arith<S>* panels, int64_t columns) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t panel_size = y.dim * columns;
  const auto place = [&](int64_t c, int64_t t) { return panels + t / columns * panel_size + c * columns + t % columns; };
  const auto put = [](S* target, Vec<T> v, int64_t n) {
    if (n >= lanes) {
      store(target, v);
    } else {
      store_partial(target, v, n);
    }
  };
  if (y.token_major()) {
    for (int64_t c = 0; c < y.dim; ++c) {
      S* row = y.data + c * y.dim_stride + first;
      for (int64_t start = 0; start < count; start += columns) {
        const T* in = panels + start / columns * panel_size + c * columns;
        for (int64_t t = 0; t < min_of(columns, count - start); t += lanes) put(row + start + t, load(in + t), count - start - t);
      }
    }
    return;
  }
  if (y.channel_major()) {
    const int64_t stride = y.token_stride();
    for (int64_t t = 0; t < count; t += lanes) {
      for (int64_t c = 0; c < y.dim; c += lanes) {
        const int64_t channels = min_of(y.dim - c, lanes);
        Vec<T> block[lanes] = {};
        for (int64_t i = 0; i < channels; ++i) block[i] = load(place(c + i, t));
        transpose<T>(block);
        for (int64_t i = 0; i < min_of(count - t, lanes); ++i) put(y.data + (first + t + i) * stride + c, block[i], channels);
      }
    }
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t offset = y.offset(first + t);
    for (int64_t c = 0; c < y.dim; ++c) store_scalar(y.data + c * y.dim_stride + offset, *place(c, t));
  }
}

// panel [rows][columns] -> transposed [columns][stride]; stride is rows rounded up to whole vectors, the padding is zero.
template <class T>
inline void transpose_panel(const T* panel, int64_t rows, int64_t columns, T* transposed, int64_t stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t t = 0; t < columns; t += lanes) {
    for (int64_t c = 0; c < rows; c += lanes) {
      Vec<T> block[lanes] = {};
      const int64_t channels = min_of(rows - c, lanes);
      for (int64_t i = 0; i < channels; ++i) block[i] = load(panel + (c + i) * columns + t);
      transpose<T>(block);
      for (int64_t i = 0; i < lanes; ++i) store(transposed + (t + i) * stride + c, block[i]);
    }
  }
}

// count values of storage type S to the arithmetic type.
template <class S>
inline void upcast(const S* source, int64_t count, Arith<S>* target) {
  constexpr int64_t lanes = kLanes<Arith<S>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
  for (; i < count; ++i) target[i] = to_float(source[i]);
}

// A weight in the arithmetic type: the tensor's own memory where it already is, a converted copy elsewhere. A null source is a vector of zeros.
template <class S>
class Weight {
 public:
  using T = Arith<S>;
  Weight(const void* source, int64_t count) : copy_(needs_copy(source) ? count : 0) {
    if (!needs_copy(source)) {
      data_ = static_cast<const T*>(source);
      return;
    }
    data_ = copy_;
    if (source) {
      const S* values = static_cast<const S*>(source);
      constexpr int64_t kChunk = 16384;
      const int64_t chunks = ceil_div(count, kChunk);
      T* target = copy_;
      parallel(chunks, [&](int64_t i) { upcast(values + i * kChunk, min_of(kChunk, count - i * kChunk), target + i * kChunk); });
    } else {
      std::memset(copy_.get(), 0, static_cast<size_t>(count) * sizeof(T));
    }
  }
  operator const T*() const { return data_; }

 private:
  static bool needs_copy(const void* source) { return !source || !std::is_same_v<S, T>; }
  Buffer<T> copy_;
  const T* data_;
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
