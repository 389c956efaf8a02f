// Forward of separable self-attention: pool, context, project (vitkernels/ops/separable/README.md).
#pragma once

#include "separable/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace separable;

// First pass: query logits, online softmax, pooled input.

// One worker's part of a sample: for each group the maximum m of its logits, l = sum exp(logit - m), mass = the same with dropout's multipliers, and
// sum exp(logit - m) x as one vector per channel, whose lanes are added up at the end.
template <class T>
struct PoolPart {
  T *m, *l, *mass;      // [P]
  T* sums;              // [P][d][lanes]

  static int64_t size(int64_t groups, int64_t dim) { return round_up(groups * 3, kLanes<T>) + groups * dim * kLanes<T>; }
  PoolPart(T* memory, int64_t groups, int64_t dim)
      : m(memory), l(m + groups), mass(l + groups), sums(memory + round_up(groups * 3, kLanes<T>)) {
    for (int64_t g = 0; g < groups; ++g) {
      m[g] = -__builtin_inff();
      l[g] = mass[g] = 0;
    }
    zero(sums, groups * dim * kLanes<T>);
  }
};

template <class S>
void pool_part(
    const SelfForward& a, const Groups& groups, const Arith<S>* query_weight, Arith<S> query_bias, int64_t sample, Range tiles, PoolPart<Arith<S>> part) {
  using T = Arith<S>;
  constexpr int64_t tile = kForwardTile, lanes = kLanes<T>;
  constexpr int vectors = kForwardVectors<T>;
  const int64_t tokens = a.height * a.width;
  const Tokens<S> x = tokens_of<S>(a.x, a, sample);
  T* logits = static_cast<T*>(a.logits) + sample * tokens;
  const T* scale = a.score_scale ? static_cast<const T*>(a.score_scale) + sample * tokens : nullptr;
  Buffer<T> panels(kTilesPerStep * a.dim * tile);
  for (int64_t i = tiles.begin, step; i < tiles.end; i += step) {
    step = min_of(kTilesPerStep, tiles.end - i);
    load_panels(x, i * tile, min_of(step * tile, tokens - i * tile), panels.get(), tile);
    for (int64_t s = 0; s < step; ++s) {
      const T* panel = panels + s * a.dim * tile;
      const int64_t first = (i + s) * tile, count = min_of(tile, tokens - first);
      const int32_t* ids = groups.at(first);
      T logit[tile], multiplier[tile];
      row_times_panel<vectors>(query_weight, panel, a.dim, query_bias, logit);
      std::memcpy(logits + first, logit, static_cast<size_t>(count) * sizeof(T));
      for (int64_t t = count; t < tile; ++t) logit[t] = -__builtin_inff();
      if (scale) {
        for (int64_t t = 0; t < tile; ++t) multiplier[t] = t < count ? scale[first + t] : T(0);
      }
      const Present present(ids, count);
      for (int p = 0; p < present.count; ++p) {
        const int32_t g = present.group[p];
        Vec<T> w[vectors], largest = broadcast(T(-__builtin_inff()));
        for (int j = 0; j < vectors; ++j) {
          w[j] = only_group<T>(load(logit + j * lanes), ids + j * lanes, g, -__builtin_inff());
          largest = max_vec(largest, w[j]);
        }
        const T previous = part.m[g], highest = max_of(previous, reduce_max<T>(largest));
        T* sums = part.sums + g * a.dim * lanes;
        if (highest > previous && part.l[g] != 0) {
          const Vec<T> correction = exp(broadcast(previous - highest));
          part.l[g] *= correction[0];
          part.mass[g] *= correction[0];
          for (int64_t c = 0; c < a.dim; ++c) store(sums + c * lanes, load(sums + c * lanes) * correction);
        }
        part.m[g] = highest;
        Vec<T> sum = {}, scaled = {};
        for (int j = 0; j < vectors; ++j) {
          w[j] = exp(w[j] - highest);
          sum += w[j];
          if (!scale) continue;
          w[j] *= load(multiplier + j * lanes);
          scaled += w[j];
        }
        part.l[g] += reduce_add<T>(sum);
        if (scale) part.mass[g] += reduce_add<T>(scaled);
        for (int64_t c = 0; c < a.dim; ++c) {
          const T* row = panel + c * tile;
          Vec<T> pooled = w[0] * load(row);
#pragma GCC unroll 16
          for (int j = 1; j < vectors; ++j) pooled += w[j] * load(row + j * lanes);
          store(sums + c * lanes, load(sums + c * lanes) + pooled);
        }
      }
    }
  }
}

// Joins the parts of one sample: softmax statistics (maximum, sum), pooled input and mass of each group.
template <class T>
void join_parts(T* memory, int64_t parts, int64_t groups, int64_t dim, bool has_mass, T* stats, T* pooled, T* mass) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t size = PoolPart<T>::size(groups, dim);
  for (int64_t g = 0; g < groups; ++g) {
    T m = -__builtin_inff(), l = 0, kept = 0;
    for (int64_t s = 0; s < parts; ++s) m = max_of(m, memory[s * size + g]);
    T* out = pooled + g * dim;
    for (int64_t c = 0; c < dim; ++c) out[c] = 0;
    for (int64_t s = 0; s < parts; ++s) {
      const T* part = memory + s * size;
      if (part[groups + g] == 0) continue;
      const T correction = exp(broadcast(part[g] - m))[0];
      l += part[groups + g] * correction;
      kept += part[2 * groups + g] * correction;
      const T* sums = part + round_up(groups * 3, lanes) + g * dim * lanes;
      for (int64_t c = 0; c < dim; ++c) out[c] += reduce_add<T>(load(sums + c * lanes)) * correction;
    }
    const T inverse = l == 0 ? T(0) : T(1) / l;  // a group without tokens pools to zero
    for (int64_t c = 0; c < dim; ++c) out[c] *= inverse;
    stats[2 * g] = m;
    stats[2 * g + 1] = l;
    mass[g] = has_mass ? kept * inverse : l == 0 ? T(0) : T(1);
  }
}

// Second pass: both projections of a tile of tokens.

// body(sample, first token, tiles) for the tiles [range), a step of neighbours in one sample at a time.
template <class T, class Body>
inline void for_steps(const SelfAttention& a, Range range, const Body& body) {
  const int64_t per_sample = ceil_div(a.height * a.width, kForwardTile);
  for (int64_t i = range.begin, step; i < range.end; i += step) {
    step = min_of(kTilesPerStep, min_of(range.end - i, per_sample - i % per_sample));
    body(i / per_sample, i % per_sample * kForwardTile, step);
  }
}

template <class S>
void project_tiles(
    const SelfForward& a, const Groups& groups, const SelfWeights<S>& w, const Arith<S>* value_weight, const Arith<S>* out_weight, const Arith<S>* context,
    Range tiles) {
  using T = Arith<S>;
  constexpr int64_t tile = kForwardTile;
  const int64_t tokens = a.height * a.width, stride = context_stride<T>(groups.count);
  Buffer<T> panels(kTilesPerStep * a.dim * tile), gated(a.dim * tile);
  for_steps<T>(a, tiles, [&](int64_t sample, int64_t first, int64_t step) {
    const int64_t count = min_of(step * tile, tokens - first);
    const T* sample_context = context + sample * a.dim * stride;
    load_panels(tokens_of<S>(a.x, a, sample), first, count, panels.get(), tile);
    for (int64_t s = 0; s < step; ++s) {
      T* panel = panels + s * a.dim * tile;
      const GroupLookup<T, kForwardVectors<T>> lookup(groups.at(first + s * tile), groups.count);
      gemm<T>(a.dim, a.dim, kForwardVectors<T>, value_weight, a.dim, 1, panel, tile, [&](int64_t row, int64_t vector, Vec<T> acc) {
        const Vec<T> value = relu(acc + w.value_bias[row]);
        store(gated + row * tile + vector * kLanes<T>, value * lookup(sample_context + row * stride, static_cast<int>(vector)));
      });
      gemm<T>(a.dim, a.dim, kForwardVectors<T>, out_weight, a.dim, 1, gated.get(), tile, [&](int64_t row, int64_t vector, Vec<T> acc) {
        store(panel + row * tile + vector * kLanes<T>, acc + w.out_bias[row]);
      });
    }
    store_panels(tokens_of<S>(a.y, a, sample), first, count, panels.get(), tile);
  });
}

#if defined(__AVX512BF16__)

// The same on bfloat16 dot products; dim is even. The gated values are rounded to bfloat16 between the projections, as eager's are.
void project_tiles_bf16(
    const SelfForward& a, const Groups& groups, const SelfWeights<BFloat16>& w, const float* context, Range tiles) {
  constexpr int64_t tile = kForwardTile;
  const int64_t tokens = a.height * a.width, stride = context_stride<float>(groups.count);
  Buffer<float> panels(kTilesPerStep * a.dim * tile);
  Buffer<uint32_t> input(a.dim / 2 * tile), gated(a.dim / 2 * tile);
  for_steps<float>(a, tiles, [&](int64_t sample, int64_t first, int64_t step) {
    const int64_t count = min_of(step * tile, tokens - first);
    const float* sample_context = context + sample * a.dim * stride;
    load_panels(tokens_of<BFloat16>(a.x, a, sample), first, count, panels.get(), tile);
    for (int64_t s = 0; s < step; ++s) {
      float* panel = panels + s * a.dim * tile;
      pair_panel(panel, a.dim, tile, input);
      const GroupLookup<float, kForwardVectors<float>> lookup(groups.at(first + s * tile), groups.count);
      gemm_bf16(a.dim, a.dim / 2, kForwardVectors<float>, w.value_source, a.dim, input.get(), tile, [&](int64_t row, int64_t vector, Vec<float> acc) {
        const Vec<float> value = relu(acc + w.value_bias[row]) * lookup(sample_context + row * stride, static_cast<int>(vector));
        const WordBits bits = round_to_bfloat16(value);
        uint32_t* pair = gated + row / 2 * tile + vector * kFloatLanes;
        // Rows arrive in order: an even row writes the pair, the odd one after it fills the upper half.
        store<uint32_t>(pair, row % 2 == 0 ? bits >> 16 : load<uint32_t>(pair) | (bits & 0xffff0000u));
      });
      gemm_bf16(a.dim, a.dim / 2, kForwardVectors<float>, static_cast<const BFloat16*>(a.out_weight), a.dim, gated.get(), tile, [&](int64_t row, int64_t vector, Vec<float> acc) {
        store(panel + row * tile + vector * kFloatLanes, acc + w.out_bias[row]);
      });
    }
    store_panels(tokens_of<BFloat16>(a.y, a, sample), first, count, panels.get(), tile);
  });
}

#endif  // __AVX512BF16__

template <class S>
void self_forward(const SelfForward& a) {
  using T = Arith<S>;
  constexpr int64_t tile = kForwardTile;
  const int64_t tokens = a.height * a.width, per_sample = ceil_div(tokens, tile), threads = num_threads();
  const Groups groups(a, per_sample * tile);
  const SelfWeights<S> w(a, a.out_bias);
  T *stats = static_cast<T*>(a.stats), *pooled = static_cast<T*>(a.pooled);

  const int64_t parts = max_of<int64_t>(1, min_of(ceil_div(threads, max_of<int64_t>(a.batch, 1)), min_of(per_sample, a.dim * tokens / kSerialWork)));
  const int64_t part_size = PoolPart<T>::size(groups.count, a.dim);
  Buffer<T> part_memory(a.batch * parts * part_size), mass(a.batch * groups.count);
  const auto join = [&](int64_t sample) {
    join_parts<T>(
        part_memory + sample * parts * part_size, parts, groups.count, a.dim, a.score_scale, stats + sample * groups.count * 2,
        pooled + sample * groups.count * a.dim, mass + sample * groups.count);
  };
  parallel(a.batch * parts, [&](int64_t i) {
    const PoolPart<T> part(part_memory + i * part_size, groups.count, a.dim);
    pool_part<S>(a, groups, w.query, w.bias[0], i / parts, share(per_sample, i % parts, parts), part);
    if (parts == 1) join(i);
  });
  for (int64_t sample = 0; sample < a.batch && parts > 1; ++sample) join(sample);
  Buffer<T> context(a.batch * a.dim * context_stride<T>(groups.count));
  compute_context<S>(a, w, pooled, mass, groups.count, context);

  const int64_t tiles = a.batch * per_sample;
#if defined(__AVX512BF16__)
  if constexpr (kBFloat16Dots<S>) {
    if (a.dim % 2 == 0) {
      const int64_t workers = min_of(threads, tiles);
      parallel(workers, [&](int64_t i) { project_tiles_bf16(a, groups, w, context, share(tiles, i, workers)); });
      return;
    }
  }
#endif
  const Weight<S> value_weight(w.value_source, a.dim * a.dim), out_weight(a.out_weight, a.dim * a.dim);
  const int64_t workers = min_of(threads, tiles);
  parallel(workers, [&](int64_t i) { project_tiles<S>(a, groups, w, value_weight, out_weight, context, share(tiles, i, workers)); });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
