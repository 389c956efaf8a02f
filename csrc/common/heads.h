// Rows of attention heads: in and out of tensors of any strides, and as the operands of the products of attention.
#pragma once

#include <limits>

#include "common/gemm.h"
#include "common/map.h"
#include "common/rows.h"
#include "common/tile.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// Rows of one head, of the storage type. Row i begins i strides from `data`; or, where the rows are pixels of a map, `line` of them lie one row_stride apart and
// the next line begins a line_stride further on; and from row `own` on, rows are those of `tail`, whose columns are neighbours (keys that sequences share).
struct HeadRows {
  const void* data;
  int64_t row_bytes;      // stride of a row, in bytes
  int64_t column_stride;  // in elements
  int64_t line = 0, line_bytes = 0;
  const void* tail = nullptr;
  int64_t own = 0, tail_bytes = 0;
  int64_t first = 0;  // what is row 0 here

  template <class S>
  const S* row(int64_t i) const {
    i += first;
    const bool shared = tail && i >= own;
    const char* base = static_cast<const char*>(shared ? tail : data);
    if (shared) return reinterpret_cast<const S*>(base + (i - own) * tail_bytes);
    if (line) return reinterpret_cast<const S*>(base + i / line * line_bytes + i % line * row_bytes);
    return reinterpret_cast<const S*>(base + i * row_bytes);
  }
  // Between the columns of row i.
  int64_t columns_of(int64_t i) const { return tail && first + i >= own ? 1 : column_stride; }

  HeadRows after(int64_t rows) const {
    HeadRows later = *this;
    later.first += rows;
    return later;
  }
  // From a later column on, given as columns * bytes of an element.
  HeadRows from_column(int64_t column_bytes) const {
    HeadRows later = *this;
    later.data = static_cast<const char*>(data) + column_bytes * column_stride;
    later.tail = tail ? static_cast<const char*>(tail) + column_bytes : nullptr;
    return later;
  }
};

// Rows of one head lie far apart in memory, where no hardware prefetcher sees them coming.
constexpr int64_t kRowsAhead = 8;
// In a channels-first map neighbouring rows are neighbours in memory and a row's columns lie a power of two apart, in few sets of the cache: so many rows are read
// and written column by column.
constexpr int64_t kRowsTogether = 16;

template <class S>
void load_rows(const HeadRows& from, int64_t rows, int64_t columns, Arith<S>* to, int64_t to_row) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const auto copy = [&](const S* source, const S* ahead, T* target) {
    for (int64_t c = 0; c < to_row; c += lanes) {
      const int64_t left = columns - c;
      __builtin_prefetch(ahead + c);
      store(target + c, left >= lanes ? load(source + c) : left > 0 ? load_partial(source + c, left) : Vec<T>{});
    }
  };
  if (from.column_stride == 1 && !from.line && !from.tail) {
    const char* source = reinterpret_cast<const char*>(from.row<S>(0));
    for (int64_t i = 0; i < rows; ++i, source += from.row_bytes) {
      copy(reinterpret_cast<const S*>(source), reinterpret_cast<const S*>(source + kRowsAhead * from.row_bytes), to + i * to_row);
    }
    return;
  }
  for (int64_t begin = 0; begin < rows; begin += kRowsTogether) {
    const S* sources[kRowsTogether];
    const int64_t count = min_of(rows - begin, kRowsTogether);
    for (int64_t i = 0; i < count; ++i) sources[i] = from.row<S>(begin + i);
    if (from.columns_of(begin) == 1 && from.columns_of(begin + count - 1) == 1) {
      for (int64_t i = 0; i < count; ++i) copy(sources[i], from.row<S>(begin + i + kRowsAhead), to + (begin + i) * to_row);
      continue;
    }
    int64_t strides[kRowsTogether];
    for (int64_t i = 0; i < count; ++i) strides[i] = from.columns_of(begin + i);
    for (int64_t c = 0; c < to_row; ++c) {
      for (int64_t i = 0; i < count; ++i) to[(begin + i) * to_row + c] = c < columns ? to_float(sources[i][c * strides[i]]) : T(0);
    }
  }
}

template <class S>
void store_rows(const HeadRows& to, int64_t rows, int64_t columns, const Arith<S>* from, int64_t from_row) {
  constexpr int64_t lanes = kLanes<Arith<S>>;
  if (to.column_stride != 1) {
    for (int64_t begin = 0; begin < rows; begin += kRowsTogether) {
      S* targets[kRowsTogether];
      const int64_t count = min_of(rows - begin, kRowsTogether);
      for (int64_t i = 0; i < count; ++i) targets[i] = const_cast<S*>(to.row<S>(begin + i));
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t i = 0; i < count; ++i) store_scalar(targets[i] + c * to.column_stride, from[(begin + i) * from_row + c]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    S* target = const_cast<S*>(to.row<S>(i));
    const Arith<S>* source = from + i * from_row;
    for (int64_t c = 0; c < columns; c += lanes) {
      if (columns - c >= lanes) {
        store(target + c, load(source + c));
      } else {
        store_partial(target + c, load(source + c), columns - c);
      }
    }
  }
}

// How tensors are read and written, by the type they are stored in; all else is compiled for the arithmetic type alone.
template <class T>
struct Storage {
  int64_t bytes;  // of an element
  void (*load_rows)(const HeadRows& from, int64_t rows, int64_t columns, T* to, int64_t to_row);  // the padding of a row is zero
  void (*store_rows)(const HeadRows& to, int64_t rows, int64_t columns, const T* from, int64_t from_row);
};

template <class S>
constexpr Storage<Arith<S>> kStorage = {sizeof(S), load_rows<S>, store_rows<S>};

template <class T>
const Storage<T>& storage_of(Dtype dtype);
template <>
const Storage<double>& storage_of(Dtype) { return kStorage<double>; }
template <>
const Storage<float>& storage_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? kStorage<float> : dtype == Dtype::kBFloat16 ? kStorage<BFloat16> : kStorage<Float16>;
}

// Of a [batch, heads, rows, columns] tensor.
template <class T>
inline HeadRows head_rows(const Storage<T>& io, const Map& map, int64_t sample, int64_t head, int64_t row = 0) {
  return {static_cast<const char*>(map.data) + (sample * map.batch_stride + head * map.dim_stride + row * map.height_stride) * io.bytes, map.height_stride * io.bytes, map.width_stride};
}

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
inline T dot_rows(const T* a, const T* b, int64_t row) {
  Vec<T> sum{};
  for (int64_t c = 0; c < row; c += kLanes<T>) sum += load(a + c) * load(b + c);
  return reduce_add<T>(sum);
}

// The right operands of the products lie in panels of two vectors, [depth][kPanel], one after the other: what a block of the product reads is then contiguous.
// (As one wide matrix, 256 columns are a stride of 1 kB, and the 64 rows of a head fall into an eighth of the sets of an L1 cache.)
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// gemm over such panels, `stride` elements apart.
template <class T, class Epilogue>
inline void gemm_panels(int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_row, int64_t a_col, const T* panels, int64_t stride, const Epilogue& epilogue) {
  for (int64_t v = 0; v < vectors; v += 2) {
    gemm<T>(rows, depth, min_of<int64_t>(vectors - v, 2), a, a_row, a_col, panels + v / 2 * stride, kPanel<T>, [&](int64_t i, int64_t c, Vec<T> acc) { epilogue(i, v + c, acc); });
  }
}

// Rows of a head as panels [columns][kPanel], zero beyond `count` up to a whole vector: K^T. change(rows, count) may work on what was loaded.
template <class T, class Change>
void pack_transposed(const Storage<T>& io, const HeadRows& from, int64_t count, int64_t columns, const Change& change, T* panels) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t stage_row = round_up(columns, lanes);
  Buffer<T> stage(lanes * stage_row);
  for (int64_t j = 0; j < round_up(count, lanes); j += lanes) {
    const int64_t rows = min_of(count - j, lanes);
    T* panel = panels + j / kPanel<T> * kPanel<T> * columns + j % kPanel<T>;
    io.load_rows(from.after(j), rows, columns, stage, stage_row);
    change(stage.get(), rows);
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<T> block[lanes] = {};
      for (int64_t i = 0; i < rows; ++i) block[i] = load(stage + i * stage_row + c);
      transpose<T>(block);
      for (int64_t i = 0; i < min_of(columns - c, lanes); ++i) store(panel + (c + i) * kPanel<T>, block[i]);
    }
  }
}

#if defined(__AVX512BF16__)

// --- bfloat16 in pairs, two products a lane ---------------------------------------------------------------------------------------------
// Everything is kept in units of 32 bits, so that a float buffer holds it. The rows of a left operand are plain bfloat16 of even length; panels hold rows 2 c and
// 2 c + 1 of the right operand in the low and high halves of one row.

// Rows of a head, `row` pairs each, zero from column `columns` on. change(floats, rows) works on rows of round_up(columns, lanes) floats; `plain`: it does nothing.
template <class Change>
void load_pairs(const Storage<float>& io, const HeadRows& from, int64_t rows, int64_t columns, bool plain, const Change& change, float* to, int64_t row) {
  if (plain && from.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const BFloat16* source = from.row<BFloat16>(i);
      for (int64_t c = 0; c < row; c += kFloatLanes) {
        const int64_t left = min_of<int64_t>(max_of<int64_t>(columns - 2 * c, 0), 2 * kFloatLanes);
        const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        _mm512_storeu_si512(to + i * row + c, _mm512_maskz_loadu_epi16(mask, source + 2 * c));
      }
    }
    return;
  }
  const int64_t wide_row = round_up(columns, kFloatLanes);
  Buffer<float> wide(rows * wide_row);
  io.load_rows(from, rows, columns, wide, wide_row);
  change(wide.get(), rows);
  for (int64_t i = 0; i < rows; ++i) {
    BFloat16* target = reinterpret_cast<BFloat16*>(to + i * row);
    for (int64_t c = 0; c < 2 * row; c += kFloatLanes) store(target + c, c < wide_row ? load(wide + i * wide_row + c) : Vec<float>{});
  }
}

// Rows of a head as panels [pairs of columns][kPanel]: K^T.
template <class Change>
void pack_transposed_pairs(const Storage<float>& io, const HeadRows& from, int64_t count, int64_t columns, bool plain, const Change& change, float* panels) {
  const int64_t pairs = ceil_div(columns, 2), row = round_up(pairs, kFloatLanes);
  Buffer<float> stage(kFloatLanes * row);
  for (int64_t j = 0; j < count; j += kFloatLanes) {
    const int64_t rows = min_of<int64_t>(count - j, kFloatLanes);
    float* panel = panels + j / kPanel<float> * kPanel<float> * pairs + j % kPanel<float>;
    load_pairs(io, from.after(j), rows, columns, plain, change, stage, row);
    for (int64_t c = 0; c < pairs; c += kFloatLanes) {
      Vec<float> block[kFloatLanes] = {};
      for (int64_t i = 0; i < rows; ++i) block[i] = load(stage + i * row + c);
      transpose<float>(block);
      for (int64_t i = 0; i < min_of<int64_t>(pairs - c, kFloatLanes); ++i) store(panel + (c + i) * kPanel<float>, block[i]);
    }
  }
}

inline WordBits half_words(const BFloat16* row, int64_t stride, int64_t c, int64_t left) {
  HalfBits bits{};
  if (stride == 1 && left == kFloatLanes) {
    std::memcpy(&bits, row + c, sizeof bits);
  } else {
    for (int64_t i = 0; i < left; ++i) bits[i] = row[(c + i) * stride].bits;
  }
  return __builtin_convertvector(bits, WordBits);
}

// Rows of a head as panels [pairs of rows][kPanel]: V.
inline void pack_row_pairs(const HeadRows& from, int64_t count, int64_t columns, float* panels) {
  const int64_t panel = ceil_div(count, 2) * kPanel<float>;
  for (int64_t j = 0; j < count; j += 2) {
    const BFloat16* even = from.row<BFloat16>(j);
    const BFloat16* odd = j + 1 < count ? from.row<BFloat16>(j + 1) : nullptr;
    const int64_t even_stride = from.columns_of(j), odd_stride = from.columns_of(j + 1);
    for (int64_t c = 0; c < columns; c += kFloatLanes) {
      const int64_t left = min_of<int64_t>(columns - c, kFloatLanes);
      const WordBits low = half_words(even, even_stride, c, left), high = odd ? half_words(odd, odd_stride, c, left) : WordBits{};
      const WordBits pair = low | high << 16;
      std::memcpy(panels + c / kPanel<float> * panel + j / 2 * kPanel<float> + c % kPanel<float>, &pair, sizeof pair);
    }
  }
}

inline void store_bfloat16(float* row, int64_t c, Vec<float> v) {
  const __m256bh half = _mm512_cvtneps_pbh(v);
  std::memcpy(reinterpret_cast<BFloat16*>(row) + c, &half, sizeof half);
}

// gemm_panels of pairs: rows of a are a_row elements of bfloat16 apart.
template <class Epilogue>
inline void gemm_pairs(int64_t rows, int64_t pairs, int64_t vectors, const float* a, int64_t a_row, const float* panels, int64_t stride, const Epilogue& epilogue) {
  for (int64_t v = 0; v < vectors; v += 2) {
    const uint32_t* panel = reinterpret_cast<const uint32_t*>(panels + v / 2 * stride);
    gemm_bf16(rows, pairs, min_of<int64_t>(vectors - v, 2), reinterpret_cast<const BFloat16*>(a), a_row, panel, kPanel<float>,
              [&](int64_t i, int64_t c, Vec<float> acc) { epilogue(i, v + c, acc); });
  }
}

#endif  // __AVX512BF16__

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
