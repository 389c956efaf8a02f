// The backward: recomputes the weights from the saved logsumexp (FlashAttention-2, arXiv 2307.08691, algorithm 2). A unit is a sample and a head, so that every
// gradient has one writer; those of the memory are written once a sample and then summed over the batch in its order.
#pragma once

#include "memory/pieces.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// A tile's rows are the depth of the products that add to dK and dV.
constexpr int64_t kBackwardRows = 64, kLeastBackwardRows = 16, kMapBytes = 512 << 10;

// The keys and values of one sample and head in every form the products want, and their gradients so far; piece after piece.
template <class T>
struct KeySide {
  const T *keys, *keys_t, *values_t;  // [keys][dim_row]; panels of [dim] and of [value_dim]
  T *grad_k, *grad_v;                 // [keys][dim_row], [keys][value_row]
};

template <class T>
void backward_tile(const Backward& a, const Storage<T>& io, const Pieces<T>& pieces, const Tile& tile, const KeySide<T>& side, bool need_k, bool need_v) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t dim_row = round_up(a.dim, lanes), value_row = round_up(a.value_dim, lanes), width = pieces.width(), size = tile.rows * width;
  Buffer<T> q(tile.rows * dim_row), grad_out(tile.rows * value_row), grad_q(tile.rows * dim_row);
  Buffer<T> weights(size), grads(size), factors(a.dropout ? size : 0);
  io.load_rows(head_rows(io, a.q, tile.sample, tile.head, tile.first), tile.rows, a.dim, q, dim_row);
  if (a.grad_out.data) {
    io.load_rows(head_rows(io, a.grad_out, tile.sample, tile.head, tile.first), tile.rows, a.value_dim, grad_out, value_row);
  } else {
    clear(grad_out.get(), tile.rows * value_row);
  }
  clear(grad_q.get(), tile.rows * dim_row);
  clear(grads.get(), size);
  logits(a, pieces, tile, q.get(), dim_row, side.keys_t, weights.get());
  for_seen(pieces, tile, [&](const Piece& p, int64_t row, int64_t rows) {
    T* at = grads + row * width + p.column;
    gemm_panels<T>(rows, a.value_dim, ceil_div(p.count, lanes), grad_out + row * value_row, value_row, 1, side.values_t + p.panels_before * a.value_dim, a.value_dim * kPanel<T>,
                   [&](int64_t i, int64_t c, Vec<T> acc) { store(at + i * width + c * lanes, acc); });
  });
  if (a.dropout) factors_of(a, pieces, tile, factors.get());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t at = (tile.sample * a.heads + tile.head) * a.queries + tile.first + i;
    logit_gradients<T>(a.lse[at], a.grad_lse ? static_cast<T>(a.grad_lse[at]) : T(0), width, weights + i * width, grads + i * width, a.dropout ? factors + i * width : nullptr);
  }
  const T scale = static_cast<T>(a.scale);
  for_seen(pieces, tile, [&](const Piece& p, int64_t row, int64_t rows) {
    const int64_t map = row * width + p.column;
    const auto adding = [](T* to, int64_t to_row, T factor) {
      return [=](int64_t i, int64_t c, Vec<T> acc) { store(to + i * to_row + c * kLanes<T>, load(to + i * to_row + c * kLanes<T>) + acc * factor); };
    };
    for (int64_t j = 0; j < p.count; j += kKeyChunk) {
      const int64_t count = min_of(kKeyChunk, p.count - j), key = p.rows_before + j;
      if (need_v) {
        gemm<T>(count, rows, value_row / lanes, weights + map + j, 1, width, grad_out + row * value_row, value_row, adding(side.grad_v + key * value_row, value_row, T(1)));
      }
      if (need_k) gemm<T>(count, rows, dim_row / lanes, grads + map + j, 1, width, q + row * dim_row, dim_row, adding(side.grad_k + key * dim_row, dim_row, scale));
      if (a.grad_q) gemm<T>(rows, count, dim_row / lanes, grads + map + j, width, 1, side.keys + key * dim_row, dim_row, adding(grad_q + row * dim_row, dim_row, scale));
    }
  });
  const int64_t place = ((tile.sample * a.heads + tile.head) * a.queries + tile.first) * a.dim;
  if (a.grad_q) io.store_rows(dense_rows(io, a.grad_q, place, a.dim), tile.rows, a.dim, grad_q, dim_row);
}

// Each sample's part [M, H, columns] of a gradient of the memory, to their sum.
template <class T>
void sum_samples(const Backward& a, const Storage<T>& io, const T* parts, int64_t columns, void* grad) {
  if (!grad) return;
  const int64_t row = a.heads * columns, size = a.memories() * row;
  parallel(a.memories(), [&](int64_t m) {
    Buffer<T> sum(round_up(row, kLanes<T>));
    clear(sum.get(), row);
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t c = 0; c < row; ++c) sum[c] += parts[b * size + m * row + c];
    }
    io.store_rows(dense_rows(io, grad, m * row, row), 1, row, sum, row);
  });
}

template <class T>
void backward(const Backward& a) {
  const Storage<T>& io = storage_of<T>(a.dtype);
  constexpr int64_t lanes = kLanes<T>;
  const int64_t dim_row = round_up(a.dim, lanes), value_row = round_up(a.value_dim, lanes), memories = a.memories();
  const bool need_k = a.grad_k || a.grad_own_k || a.grad_memory_k, need_v = a.grad_v || a.grad_own_v || a.grad_memory_v;
  Buffer<T> parts_k(a.grad_memory_k ? a.batch * memories * a.heads * a.dim : 0), parts_v(a.grad_memory_v ? a.batch * memories * a.heads * a.value_dim : 0);
  parallel(a.batch * a.heads, [&](int64_t unit) {
    const int64_t sample = unit / a.heads, head = unit % a.heads;
    const Pieces<T> pieces(a, io, sample, head);
    Buffer<T> keys(pieces.rows() * dim_row), keys_t(pieces.panels() * a.dim), values_t(pieces.panels() * a.value_dim);
    Buffer<T> grad_k(pieces.rows() * dim_row), grad_v(pieces.rows() * value_row);
    clear(grad_k.get(), pieces.rows() * dim_row);
    clear(grad_v.get(), pieces.rows() * value_row);
    for (const Piece& p : pieces) {
      io.load_rows(p.k, p.count, a.dim, keys + p.rows_before * dim_row, dim_row);
      pack_transposed(io, p.k, p.count, a.dim, [](T*, int64_t) {}, keys_t + p.panels_before * a.dim);
      pack_transposed(io, p.v, p.count, a.value_dim, [](T*, int64_t) {}, values_t + p.panels_before * a.value_dim);
    }
    const int64_t fitting = kMapBytes / (2 * pieces.width() * static_cast<int64_t>(sizeof(T)));
    const int64_t rows = even_tile(a.queries, min_of(max_of(fitting, kLeastBackwardRows), kBackwardRows));
    for (int64_t i = 0; i < a.queries; i += rows) {
      backward_tile<T>(a, io, pieces, {sample, head, i, min_of(rows, a.queries - i)}, {keys, keys_t, values_t, grad_k, grad_v}, need_k, need_v);
    }
    const auto put = [&](void* base, void* own, T* parts, int64_t columns, const T* grad, int64_t row) {
      if (base) io.store_rows(dense_rows(io, base, unit * a.keys * columns, columns), a.keys, columns, grad, row);
      if (parts) {
        const HeadRows to = dense_rows(kStorage<T>, parts, (sample * memories * a.heads + head) * columns, a.heads * columns);
        kStorage<T>.store_rows(to, memories, columns, grad + a.keys * row, row);
      }
      if (own) io.store_rows(dense_rows(io, own, unit * a.queries * columns, columns), a.queries, columns, grad + (a.keys + memories) * row, row);
    };
    put(a.grad_k, a.grad_own_k, a.grad_memory_k ? parts_k.get() : nullptr, a.dim, grad_k, dim_row);
    put(a.grad_v, a.grad_own_v, a.grad_memory_v ? parts_v.get() : nullptr, a.value_dim, grad_v, value_row);
  });
  sum_samples<T>(a, io, parts_k, a.dim, a.grad_memory_k);
  sum_samples<T>(a, io, parts_v, a.value_dim, a.grad_memory_v);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
