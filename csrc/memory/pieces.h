// The keys of one sample and head in pieces: those all queries see, the memory of each group, the own key of each query. No piece is copied behind another one in
// a tensor; a tile's map has columns for all of them side by side, and what a row does not see stays at a logit of -inf there.
#pragma once

#include <vector>

#include "common/maps.h"
#include "memory/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace memory;

// Longer chains of sums over keys would round off more than the blocked sums of a matrix product do.
constexpr int64_t kKeyChunk = 256;

struct Piece {
  HeadRows k, v;
  int64_t count, row_begin, row_end;  // keys, and the queries that see them
  int64_t column;                     // of its first key in the map; groups share columns, and so do own keys
  int64_t place;                      // of its first key for dropout
  int64_t rows_before, panels_before;  // keys of the pieces before, as they are and filled up to whole panels
};

template <class T>
HeadRows memory_rows(const Storage<T>& io, const Rows& memory, int64_t first, int64_t head) {
  return {static_cast<const char*>(memory.data) + (first * memory.row_stride + head * memory.head_stride) * io.bytes, memory.row_stride * io.bytes, memory.column_stride};
}

// Rows of a contiguous tensor, `stride` elements apart, from element `first` on.
template <class T>
HeadRows dense_rows(const Storage<T>& io, void* data, int64_t first, int64_t stride) {
  return {static_cast<char*>(data) + first * io.bytes, stride * io.bytes, 1};
}

template <class T>
class Pieces {
 public:
  Pieces(const Attention& a, const Storage<T>& io, int64_t sample, int64_t head) {
    int64_t most = 0;
    for (int64_t g = 0; g < a.groups; ++g) most = max_of(most, a.memory_begin[g + 1] - a.memory_begin[g]);
    const int64_t memory_column = round_up(a.keys, kLanes<T>), own_column = memory_column + round_up(most, kLanes<T>);
    // Not a power of two, so that a column of a map does not fall into few sets of the cache.
    width_ = own_column + 2 * kLanes<T>;
    const int64_t place = sample * (a.keys + a.memories());
    add(head_rows(io, a.k, sample, head), head_rows(io, a.v, sample, head), a.keys, 0, a.queries, 0, place);
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t first = a.memory_begin[g], rows = a.group_rows();
      add(memory_rows(io, a.memory_k, first, head), memory_rows(io, a.memory_v, first, head), a.memory_begin[g + 1] - first, g * rows, (g + 1) * rows, memory_column, place + a.keys + first);
    }
    for (int64_t i = 0; a.own_k.data && i < a.queries; ++i) {
      add(head_rows(io, a.own_k, sample, head, i), head_rows(io, a.own_v, sample, head, i), 1, i, i + 1, own_column, place + a.keys + a.memories());
    }
  }

  const Piece* begin() const { return pieces_.data(); }
  const Piece* end() const { return pieces_.data() + pieces_.size(); }
  const Piece& operator[](int64_t index) const { return pieces_[static_cast<size_t>(index)]; }
  int64_t width() const { return width_; }  // of a row of the map
  int64_t rows() const { return rows_; }
  int64_t panels() const { return panels_; }

 private:
  void add(HeadRows k, HeadRows v, int64_t count, int64_t row_begin, int64_t row_end, int64_t column, int64_t place) {
    pieces_.push_back({k, v, count, row_begin, row_end, column, place, rows_, panels_});
    rows_ += count, panels_ += round_up(count, kPanel<T>);
  }

  std::vector<Piece> pieces_;
  int64_t width_ = 0, rows_ = 0, panels_ = 0;
};

// A tile of the queries of one sample and head.
struct Tile {
  int64_t sample, head, first, rows;
};

// body(piece, first row within the tile, rows) for the pieces that some row of a tile sees.
template <class T, class Body>
void for_seen(const Pieces<T>& pieces, const Tile& tile, const Body& body) {
  for (const Piece& piece : pieces) {
    const int64_t begin = max_of(tile.first, piece.row_begin), end = min_of(tile.first + tile.rows, piece.row_end);
    if (begin < end && piece.count > 0) body(piece, begin - tile.first, end - begin);
  }
}

// scale Q K^T of a tile into its map; -inf where a row sees no key. keys_t: each piece's K^T in panels.
template <class T>
void logits(const Attention& a, const Pieces<T>& pieces, const Tile& tile, const T* q, int64_t q_row, const T* keys_t, T* map) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = pieces.width();
  for (int64_t c = 0; c < tile.rows * width; c += lanes) store(map + c, broadcast(-kInfinity<T>));
  const T scale = static_cast<T>(a.scale);
  for_seen(pieces, tile, [&](const Piece& p, int64_t row, int64_t rows) {
    T* at = map + row * width + p.column;
    gemm_panels<T>(rows, a.dim, ceil_div(p.count, lanes), q + row * q_row, q_row, 1, keys_t + p.panels_before * a.dim, a.dim * kPanel<T>, [&](int64_t i, int64_t c, Vec<T> acc) {
      store(at + i * width + c * lanes, first_lanes<T>(acc * scale, p.count - c * lanes, -kInfinity<T>));
    });
  });
}

// What dropout multiplies a tile's weights by.
template <class T>
void factors_of(const Attention& a, const Pieces<T>& pieces, const Tile& tile, T* factors) {
  clear(factors, tile.rows * pieces.width());
  for_seen(pieces, tile, [&](const Piece& p, int64_t row, int64_t rows) {
    dropout_factors<T>(a, tile.head, tile.sample * a.queries + tile.first + row, rows, p.place, p.count, factors + row * pieces.width() + p.column, pieces.width());
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
