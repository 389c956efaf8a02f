// The forward: a tile of queries at a time against all pieces of keys, whole rows of the map at once.
#pragma once

#include "memory/pieces.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kQueryTile = 32;

// Logits to weights, not yet divided by their sum: [row], whole vectors. Returns the largest logit and the sum.
template <class T>
std::pair<T, T> softmax_row(T* at, int64_t row) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> most = broadcast(-kInfinity<T>);
  bool nan = false;
  for (int64_t c = 0; c < row; c += lanes) most = max_vec(most, load(at + c));
  const T largest = reduce_max<T>(most);
  if (largest == -kInfinity<T>) {
    for (int64_t c = 0; c < row; ++c) nan |= at[c] != at[c];
    if (!nan) return clear(at, row), std::pair(largest, T(0));
  }
  Vec<T> sum{};
  for (int64_t c = 0; c < row; c += lanes) {
    const Vec<T> p = exp(load(at + c) - largest);
    sum += p;
    store(at + c, p);
  }
  return {largest, reduce_add<T>(sum)};
}

template <class T>
void forward_tile(const Forward& a, const Storage<T>& io, const Pieces<T>& pieces, const Tile& tile, const T* keys_t, const T* values) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t dim_row = round_up(a.dim, lanes), value_row = round_up(a.value_dim, lanes), width = pieces.width();
  Buffer<T> q(tile.rows * dim_row), map(tile.rows * width), factors(a.dropout ? tile.rows * width : 0), out(tile.rows * value_row), inverse(tile.rows);
  io.load_rows(head_rows(io, a.q, tile.sample, tile.head, tile.first), tile.rows, a.dim, q, dim_row);
  logits(a, pieces, tile, q.get(), dim_row, keys_t, map.get());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const auto [largest, sum] = softmax_row(map + i * width, width);
    inverse[i] = sum == 0 ? T(0) : T(1) / sum;  // NaN stays NaN
    a.lse[(tile.sample * a.heads + tile.head) * a.queries + tile.first + i] = static_cast<double>(largest) + std::log(static_cast<double>(sum));
  }
  if (a.dropout) {
    factors_of(a, pieces, tile, factors.get());
    for (int64_t c = 0; c < tile.rows * width; c += lanes) store(map + c, load(map + c) * load(factors + c));
  }
  clear(out.get(), tile.rows * value_row);
  for_seen(pieces, tile, [&](const Piece& p, int64_t row, int64_t rows) {
    const T* panels = values + p.rows_before * round_up(value_row, kPanel<T>);
    for (int64_t j = 0; j < p.count; j += kKeyChunk) {
      gemm_panels<T>(rows, min_of(kKeyChunk, p.count - j), value_row / lanes, map + row * width + p.column + j, width, 1, panels + j * kPanel<T>, p.count * kPanel<T>,
                     [&](int64_t i, int64_t c, Vec<T> acc) {
                       T* at = out + (row + i) * value_row + c * lanes;
                       store(at, load(at) + acc);
                     });
    }
  });
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t c = 0; c < value_row; c += lanes) store(out + i * value_row + c, load(out + i * value_row + c) * inverse[i]);
  }
  const int64_t place = ((tile.sample * a.queries + tile.first) * a.heads + tile.head) * a.value_dim;
  io.store_rows(dense_rows(io, a.out, place, a.heads * a.value_dim), tile.rows, a.value_dim, out, value_row);
}

template <class T>
void forward(const Forward& a) {
  const Storage<T>& io = storage_of<T>(a.dtype);
  if (a.queries == 0) return;
  parallel(a.batch * a.heads, [&](int64_t unit) {
    const int64_t sample = unit / a.heads, head = unit % a.heads, value_row = round_up(a.value_dim, kPanel<T>);
    const Pieces<T> pieces(a, io, sample, head);
    Buffer<T> keys_t(pieces.panels() * a.dim), values(pieces.rows() * value_row);
    for (const Piece& p : pieces) {
      pack_transposed(io, p.k, p.count, a.dim, [](T*, int64_t) {}, keys_t + p.panels_before * a.dim);
      for (int64_t c = 0; c < a.value_dim; c += kPanel<T>) {
        io.load_rows(p.v.from_column(c * io.bytes), p.count, min_of(a.value_dim - c, kPanel<T>), values + p.rows_before * value_row + c * p.count, kPanel<T>);
      }
    }
    const int64_t rows = even_tile(a.queries, kQueryTile);
    for (int64_t i = 0; i < a.queries; i += rows) forward_tile(a, io, pieces, {sample, head, i, min_of(rows, a.queries - i)}, keys_t.get(), values.get());
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
