// Rows of attention maps, whatever keys they are of: how many make a tile, what dropout multiplies them by, and their gradients.
#pragma once

#include <cmath>

#include "common/heads.h"
#include "common/philox.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// The rows of a tile: as even as blocks of eight rows allow.
inline int64_t even_tile(int64_t rows, int64_t most) {
  const int64_t tiles = max_of<int64_t>(ceil_div(rows, most), 1);
  return min_of(round_up(ceil_div(rows, tiles), kBlockRows), round_up(most, kBlockRows));
}

template <class T>
void clear(T* data, int64_t count) { std::memset(data, 0, static_cast<size_t>(count) * sizeof(T)); }

// What each weight is multiplied by, [rows][row]: 0 or keep_factor, for global rows of q and of k. The counter is (key row, query row / 4, head, 0), the word
// that of query row % 4: four rows share one evaluation.
template <class T, class Attention>
void dropout_factors(const Attention& a, int64_t head, int64_t first_query, int64_t rows, int64_t first_key, int64_t keys, T* out, int64_t row) {
  const T factor = static_cast<T>(a.keep_factor);
  for (int64_t group = first_query / 4; group * 4 < first_query + rows; ++group) {
    for (int64_t j = 0; j < keys; j += kPhiloxLanes) {
      PhiloxWords words;
      for (int c = 0; c < kPhiloxLanes; ++c) {
        words[0][c] = static_cast<uint32_t>(first_key + j) + static_cast<uint32_t>(c), words[1][c] = static_cast<uint32_t>(group);
        words[2][c] = static_cast<uint32_t>(head), words[3][c] = 0;
      }
      philox(a.seed, words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t i = group * 4 + w - first_query;
        if (i < 0 || i >= rows) continue;
        T* target = out + i * row + j;
        const int64_t count = min_of<int64_t>(round_up(keys, kLanes<T>) - j, kPhiloxLanes);
        for (int64_t c = 0; c < count; ++c) target[c] = words[w][c] > a.drop_limit ? factor : T(0);
      }
    }
  }
}

// What float64 has no wider type for: by how much the rounded logsumexp falls short, from the sum of the weights that follow from it.
template <class T>
T excess(const T* logits, int64_t count, T lse) {
  Vec<T> sum{};
  for (int64_t c = 0; c < count; c += kLanes<T>) sum += first_lanes<T>(exp(load(logits + c) - lse), count - c, T(0));
  return std::log(reduce_add<T>(sum));
}

// One row, whole: logits to weights, dP to dS. The logsumexp is subtracted in two pieces: of a large one in float the rounding alone would be 1e-6 of every
// weight. delta is summed from the same products it is subtracted from (not dO O, whose O is rounded): a weight of 1 leaves exactly nothing. Dropout's factors
// stay on the weights, as they multiplied V. A row that saw nothing, and a hidden key, have weight 0.
template <class T>
void logit_gradients(double lse, T grad_lse, int64_t count, T* weights, T* grads, const T* factors) {
  constexpr int64_t lanes = kLanes<T>;
  if (lse == -kInfinity<double>) {
    clear(weights, round_up(count, lanes));
    clear(grads, round_up(count, lanes));
    return;
  }
  const T high = static_cast<T>(lse);
  T low = static_cast<T>(lse - static_cast<double>(high));
  if constexpr (std::is_same_v<T, double>) low = excess(weights, count, high);
  Vec<T> sums[2] = {};
  for (int64_t c = 0; c < count; c += lanes) {
    const Vec<T> p = first_lanes<T>(exp((load(weights + c) - high) - low), count - c, T(0));
    const Vec<T> grad = factors ? load(grads + c) * load(factors + c) : load(grads + c);
    sums[c / lanes % 2] += p * grad;
    store(weights + c, p);
    store(grads + c, grad);
  }
  const T delta = reduce_add<T>(sums[0] + sums[1]) - grad_lse;
  for (int64_t c = 0; c < count; c += lanes) {
    const Vec<T> p = load(weights + c);
    store(grads + c, p * (load(grads + c) - delta));
    if (factors) store(weights + c, p * load(factors + c));
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
