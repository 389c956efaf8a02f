// Backward of separable self-attention, two passes over the tokens (vitkernels/ops/separable/README.md).
#pragma once

#include "separable/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace separable;

// One worker's sums over its tokens, kept apart and added up in a fixed order at the end, so that results do not depend on timing.
template <class T>
struct WeightSums {
  T* value;   // [d][dp]: dW_v
  T* out;     // [d][dp]: dW_o
  T* query;   // [d][lanes]: dw_q
  T* value_bias;  // [d][lanes]
  T* out_bias;    // [d][lanes]

  static int64_t size(int64_t dim) { return 2 * dim * round_up(dim, kLanes<T>) + 3 * dim * kLanes<T>; }
  WeightSums(T* memory, int64_t dim)
      : value(memory),
        out(value + dim * round_up(dim, kLanes<T>)),
        query(out + dim * round_up(dim, kLanes<T>)),
        value_bias(query + dim * kLanes<T>),
        out_bias(value_bias + dim * kLanes<T>) {}
};

// Per-group quantities of the samples of one round, filled between the two passes.
template <class T>
struct RoundState {
  T* pooled_grad;         // [b][d][stride], as rows of groups
  T* pooled_grad_rows;    // [b][P][dp]
  T* mean;                // [b][d][stride]: the mean token, pooled / mass
  T* mean_grad;           // [b][P]: gradient of the score of a mean token
  const T* mass;          // [b][P]
};

// Transposed bfloat16 weights, for dot products along their rows.
struct Dots {
  const BFloat16 *value_transposed, *out_transposed;
};

template <class S, int64_t kTile>
struct SelfBackwardPass {
  using T = Arith<S>;
  static constexpr int64_t lanes = kLanes<T>, tile = kTile;
  static constexpr int kVectors = tile / lanes;
  static constexpr bool kInPlace = std::is_same_v<S, T>;  // grad_x itself can carry the first pass's result without rounding

  const SelfBackward& a;
  const Groups& groups;
  const SelfWeights<S>& w;
  const T *value_weight, *out_weight;
  const int64_t tokens, per_sample, dim, padded_dim, stride;
  T* partial_x;  // [sample of the round][tile][d][tile]: first pass's grad_x where it is not kept in place
  const Dots* dots;  // not null: bfloat16 dot products instead of float arithmetic

  // First pass over one tile: everything but what flows through the softmax.
  void first(int64_t sample, int64_t slot, int64_t index, const T* context, T* context_grad, WeightSums<T> sums, T* memory) const {
    T *x = memory, *grad = x + dim * tile, *gated = grad + dim * tile, *value_grad = gated + dim * tile, *transposed = value_grad + dim * tile;
    const int64_t first_token = index * tile, count = min_of(tile, tokens - first_token);
    const GroupLookup<T, kVectors> lookup(groups.at(first_token), groups.count);
    load_panels(tokens_of<S>(a.x, a, sample), first_token, count, x, tile);
    load_panels(tokens_of<S>(a.grad_y, a, sample), first_token, count, grad, tile);
    const auto keep_value = [&](int64_t row, int64_t vector, Vec<T> acc) { store(gated + row * tile + vector * lanes, relu(acc + w.value_bias[row])); };
    // acc is the gradient of the gated values; their value is read; the gated values, the gradient of W_v x and that of the context by token are written.
    const auto through_gate = [&](int64_t row, int64_t vector, Vec<T> acc) {
      const int j = static_cast<int>(vector);
      T* place = gated + row * tile + vector * lanes;
      const Vec<T> value = load(place), scale = lookup(context + row * stride, j);
      store(transposed + row * tile + vector * lanes, acc * value);
      store(value_grad + row * tile + vector * lanes, value > 0 ? acc * scale : Vec<T>{});
      store(place, value * scale);
    };
    T* target = kInPlace ? gated : partial_x + (slot * per_sample + index) * dim * tile;
    const auto keep_x = [&](int64_t row, int64_t vector, Vec<T> acc) { store(target + row * tile + vector * lanes, acc); };
    const auto add_to = [&](T* total) {
      return [this, total](int64_t row, int64_t vector, Vec<T> acc) {
        T* place = total + row * padded_dim + vector * lanes;
        store(place, load(place) + acc);
      };
    };
#if defined(__AVX512BF16__)
    if constexpr (kBFloat16Dots<S>) {
      if (dots) {
        const int64_t pairs = dim / 2 * tile;
        Buffer<uint32_t> paired(max_of(pairs, tile / 2 * padded_dim));
        Buffer<BFloat16> rounded(dim * tile);
        const auto outer = [&](const T* left, const T* right, T* total) {
          round_panel(left, dim * tile, rounded);
          transpose_panel(right, dim, tile, transposed, padded_dim);
          pair_panel(transposed, tile, padded_dim, paired);
          gemm_bf16(dim, tile / 2, padded_dim / lanes, rounded.get(), tile, paired.get(), padded_dim, add_to(total));
        };
        pair_panel(x, dim, tile, paired);
        gemm_bf16(dim, dim / 2, kVectors, w.value_source, dim, paired.get(), tile, keep_value);
        pair_panel(grad, dim, tile, paired);
        gemm_bf16(dim, dim / 2, kVectors, dots->out_transposed, dim, paired.get(), tile, through_gate);
        add_groups(transposed, groups.at(first_token), context_grad);
        if (a.grad_out_weight) outer(grad, gated, sums.out);
        if (a.grad_qkv_weight) outer(value_grad, x, sums.value);
        add_bias_sums(grad, value_grad, sums);
        if (a.grad_x.data) {
          pair_panel(value_grad, dim, tile, paired);
          gemm_bf16(dim, dim / 2, kVectors, dots->value_transposed, dim, paired.get(), tile, keep_x);
        }
        return;
      }
    }
#endif
    const auto outer = [&](const T* left, const T* right, T* total) {
      transpose_panel(right, dim, tile, transposed, padded_dim);
      gemm<T>(dim, tile, padded_dim / lanes, left, tile, 1, transposed, padded_dim, add_to(total));
    };
    gemm<T>(dim, dim, kVectors, value_weight, dim, 1, x, tile, keep_value);
    gemm<T>(dim, dim, kVectors, out_weight, 1, dim, grad, tile, through_gate);
    add_groups(transposed, groups.at(first_token), context_grad);
    if (a.grad_out_weight) outer(grad, gated, sums.out);
    if (a.grad_qkv_weight) outer(value_grad, x, sums.value);
    add_bias_sums(grad, value_grad, sums);
    if (!a.grad_x.data) return;
    gemm<T>(dim, dim, kVectors, value_weight, 1, dim, value_grad, tile, keep_x);
    if constexpr (kInPlace) store_panels(tokens_of<S>(a.grad_x, a, sample), first_token, count, gated, tile);
  }

  void add_bias_sums(const T* grad, const T* value_grad, WeightSums<T> sums) const {
    if (a.grad_out_weight) add_rows(grad, sums.out_bias);
    if (a.grad_qkv_weight) add_rows(value_grad, sums.value_bias);
  }

  // The sum of a row's vectors: the tile's own first, so that a long sum over tiles rounds once a tile.
  static Vec<T> row_sum(const T* row) {
    Vec<T> sum = load(row);
    for (int j = 1; j < kVectors; ++j) sum += load(row + j * lanes);
    return sum;
  }

  void add_rows(const T* panel, T* sums) const {
    for (int64_t c = 0; c < dim; ++c) store(sums + c * lanes, load(sums + c * lanes) + row_sum(panel + c * tile));
  }

  // sums[group][c] += the tokens of panel [d][tile] that belong to it.
  void add_groups(const T* panel, const int32_t* ids, T* sums) const {
    const Present present(ids, tile);
    for (int p = 0; p < present.count; ++p) {
      const int32_t g = present.group[p];
      T member[tile], part[tile];
      for (int64_t t = 0; t < tile; ++t) member[t] = ids[t] == g ? T(1) : T(0);
      for (int64_t c = 0; c < dim; ++c) {
        const T* row = panel + c * tile;
        if (present.count > 1) {
          for (int j = 0; j < kVectors; ++j) store(part + j * lanes, load(row + j * lanes) * load(member + j * lanes));
          row = part;
        }
        sums[g * dim + c] += reduce_add<T>(row_sum(row));
      }
    }
  }

  // Second pass over one tile: the gradient through the softmax, to x and to w_q.
  void second(int64_t sample, int64_t slot, int64_t index, const RoundState<T>& state, WeightSums<T> sums, T* memory) const {
    T *x = memory, *out = x + dim * tile;
    const int64_t first_token = index * tile, count = min_of(tile, tokens - first_token);
    const int32_t* ids = groups.at(first_token);
    const GroupLookup<T, kVectors> lookup(ids, groups.count);
    load_panels(tokens_of<S>(a.x, a, sample), first_token, count, x, tile);
    // Tokens about their group's mean: where one score is nearly 1, the difference of dot products would be mostly rounding. The gradients of a
    // group's logits add up to 0, so that of w_q is the same about the mean.
    const T* mean = state.mean + slot * dim * stride;
    for (int64_t c = 0; c < dim; ++c) {
      for (int j = 0; j < kVectors; ++j) store(x + c * tile + j * lanes, load(x + c * tile + j * lanes) - lookup(mean + c * stride, j));
    }
    const T* logits = static_cast<const T*>(a.logits) + sample * tokens + first_token;
    const T* stats = static_cast<const T*>(a.stats) + sample * groups.count * 2;
    const T* scale = a.score_scale ? static_cast<const T*>(a.score_scale) + sample * tokens + first_token : nullptr;
    T weight[tile], query_grad[tile], dot[tile], group_dot[tile];
    for (int64_t t = 0; t < tile; ++t) weight[t] = t < count ? logits[t] - stats[2 * ids[t]] : -__builtin_inff();
    for (int j = 0; j < kVectors; ++j) store(weight + j * lanes, exp(load(weight + j * lanes)));
    const Present present(ids, count);
    for (int p = 0; p < present.count; ++p) {
      const int32_t g = present.group[p];
      row_times_panel<kVectors>(state.pooled_grad_rows + (slot * groups.count + g) * padded_dim, static_cast<const T*>(x), dim, T(0), group_dot);
      for (int64_t t = 0; t < count; ++t) dot[t] = ids[t] == g ? group_dot[t] : dot[t];
    }
    for (int64_t t = 0; t < tile; ++t) {
      if (t >= count) {
        query_grad[t] = 0;
        continue;
      }
      const int64_t g = slot * groups.count + ids[t];
      const T score = weight[t] / stats[2 * ids[t] + 1], multiplier = scale ? scale[t] : T(1);
      query_grad[t] = score * (multiplier * dot[t] + (multiplier - state.mass[g]) * state.mean_grad[g]);
      weight[t] = score * multiplier;
    }
    if (a.grad_qkv_weight) {
      for (int64_t c = 0; c < dim; ++c) {
        Vec<T> sum = {};
        for (int j = 0; j < kVectors; ++j) sum += load(query_grad + j * lanes) * load(x + c * tile + j * lanes);
        store(sums.query + c * lanes, load(sums.query + c * lanes) + sum);
      }
    }
    if (!a.grad_x.data) return;
    const Tokens<S> grad_x = tokens_of<S>(a.grad_x, a, sample);
    const T* previous = out;
    if constexpr (kInPlace) {
      load_panels(grad_x, first_token, count, out, tile);
    } else {
      previous = partial_x + (slot * per_sample + index) * dim * tile;
    }
    const T* pooled_grad = state.pooled_grad + slot * dim * stride;
    for (int64_t c = 0; c < dim; ++c) {
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> through_pool = load(weight + j * lanes) * lookup(pooled_grad + c * stride, j);
        const Vec<T> through_query = load(query_grad + j * lanes) * w.query[c];
        store(out + c * tile + j * lanes, load(previous + c * tile + j * lanes) + through_pool + through_query);
      }
    }
    store_panels(grad_x, first_token, count, out, tile);
  }
};

template <class S, int64_t tile>
void self_backward_tiled(const SelfBackward& a) {
  using T = Arith<S>;
  using Pass = SelfBackwardPass<S, tile>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t tokens = a.height * a.width, per_sample = ceil_div(tokens, tile), dim = a.dim, padded_dim = round_up(dim, lanes);
  const Groups groups(a, per_sample * tile);
  const int64_t P = groups.count, stride = context_stride<T>(P);
  const SelfWeights<S> w(a, nullptr);
  // With bfloat16 dot products the weights are read as they are, and transposed; otherwise in the arithmetic type.
  const bool use_dots = kBFloat16Dots<S> && dim % 2 == 0;
  Buffer<BFloat16> transposed_weights(use_dots ? 2 * dim * dim : 0);
  const Dots dots{transposed_weights, transposed_weights + dim * dim};
#if defined(__AVX512BF16__)
  if constexpr (kBFloat16Dots<S>) {
    if (use_dots) {
      transpose_weight(w.value_source, dim, transposed_weights);
      transpose_weight(static_cast<const S*>(a.out_weight), dim, transposed_weights + dim * dim);
    }
  }
#endif
  const int64_t floats = use_dots ? 0 : dim * dim;
  const Weight<S> value_weight(w.value_source, floats), out_weight(a.out_weight, floats);
  const T *pooled = static_cast<const T*>(a.pooled), *logits = static_cast<const T*>(a.logits), *stats = static_cast<const T*>(a.stats);

  // sum_n s'_n of each group: 1 but for dropout, or 0 without tokens.
  Buffer<T> mass(a.batch * P);
  for (int64_t g = 0; g < a.batch * P; ++g) mass[g] = a.score_scale || tokens == 0 ? T(0) : T(1);
  if (a.score_scale) {
    const T* scale = static_cast<const T*>(a.score_scale);
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t g = b * P + *groups.at(t);
        mass[g] += exp(broadcast(logits[b * tokens + t] - stats[2 * g]))[0] / stats[2 * g + 1] * scale[b * tokens + t];
      }
    }
  }
  Buffer<T> context(a.batch * dim * stride);
  compute_context<S>(a, w, pooled, mass, P, context);

  // W_k in rows of whole vectors, for products along its columns: as it is, where it is so.
  const bool copy_key = !Pass::kInPlace || dim != padded_dim;
  Buffer<T> key_copy(copy_key ? dim * padded_dim : 0);
  const T* key_weight = key_copy;
  if constexpr (Pass::kInPlace) {
    if (!copy_key) key_weight = w.key;
  }
  if (copy_key) {
    parallel(dim, [&](int64_t r) {
      upcast(w.key + r * dim, dim, key_copy + r * padded_dim);
      for (int64_t c = dim; c < padded_dim; ++c) key_copy[r * padded_dim + c] = 0;
    });
  }

  // Samples go in rounds: enough of them to feed every worker, few enough that the first pass's grad_x is still in cache in the second.
  const int64_t threads = num_threads();
  const int64_t round = min_of(max_of<int64_t>(a.batch, 1), max_of<int64_t>(threads, ceil_div(2 * threads, max_of<int64_t>(per_sample, 1))));
  const int64_t workers = max_of<int64_t>(1, min_of(threads, round * per_sample));
  Buffer<T> sums_memory(workers * WeightSums<T>::size(dim));
  Buffer<T> all_context_grad(a.batch * P * dim), worker_context_grad(workers * round * P * dim);
  Buffer<T> pooled_grad(round * dim * stride), pooled_grad_rows(round * P * padded_dim), mean(round * dim * stride), mean_grad(round * P);
  Buffer<T> partial_x(Pass::kInPlace || !a.grad_x.data ? 0 : round * per_sample * dim * tile);
  const int64_t panel_memory = 4 * dim * tile + tile * padded_dim;
  Buffer<T> panels(workers * panel_memory);
  const Pass pass{a, groups, w, value_weight, out_weight, tokens, per_sample, dim, padded_dim, stride, partial_x, use_dots ? &dots : nullptr};

  if (a.batch == 0) zero<T>(sums_memory, workers * WeightSums<T>::size(dim));
  for (int64_t start = 0; start < a.batch; start += round) {
    const int64_t samples = min_of(round, a.batch - start), tasks = samples * per_sample;
    parallel(workers, [&](int64_t worker) {
      T* own = worker_context_grad + worker * round * P * dim;
      zero(own, round * P * dim);
      T* own_sums = sums_memory + worker * WeightSums<T>::size(dim);
      if (start == 0) zero(own_sums, WeightSums<T>::size(dim));
      const WeightSums<T> sums(own_sums, dim);
      const Range range = share(tasks, worker, workers);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t slot = i / per_sample, sample = start + slot;
        pass.first(sample, slot, i % per_sample, context + sample * dim * stride, own + slot * P * dim, sums, panels + worker * panel_memory);
      }
    });

    // Per group: gradient of the context and of the pooled input, the mean token and its score's gradient.
    T* context_grad = all_context_grad + start * P * dim;
    parallel(samples * P, [&](int64_t g) {
      T* total = context_grad + g * dim;
      for (int64_t c = 0; c < dim; ++c) total[c] = 0;
      for (int64_t worker = 0; worker < workers; ++worker) {
        const T* own = worker_context_grad + (worker * round * P + g) * dim;
        for (int64_t c = 0; c < dim; ++c) total[c] += own[c];
      }
      T* rows = pooled_grad_rows + g * padded_dim;
      gemm<T>(1, dim, padded_dim / lanes, static_cast<const T*>(total), dim, 1, key_weight, padded_dim, [&](int64_t, int64_t vector, Vec<T> acc) {
        store(rows + vector * lanes, acc);
      });
      const int64_t sample = g / P, group = g % P;
      const T group_mass = mass[start * P + g], inverse = group_mass == 0 ? T(0) : T(1) / group_mass;
      T gradient = 0;
      for (int64_t c = 0; c < dim; ++c) {
        const T token = pooled[(start * P + g) * dim + c] * inverse;
        gradient += w.key_bias[c] * total[c] + rows[c] * token;
        pooled_grad[(sample * dim + c) * stride + group] = rows[c];
        mean[(sample * dim + c) * stride + group] = token;
      }
      mean_grad[g] = gradient;
    });

    if (!a.grad_x.data && !a.grad_qkv_weight) continue;
    const RoundState<T> state{pooled_grad, pooled_grad_rows, mean, mean_grad, mass + start * P};
    parallel(workers, [&](int64_t worker) {
      const WeightSums<T> sums(sums_memory + worker * WeightSums<T>::size(dim), dim);
      const Range range = share(tasks, worker, workers);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t slot = i / per_sample;
        pass.second(start + slot, slot, i % per_sample, state, sums, panels + worker * panel_memory);
      }
    });
  }

  // Add the workers' sums in order and write the weights' gradients, a block of rows a task.
  const auto total = [&](int64_t offset) {
    Vec<T> sum = {};
    for (int64_t worker = 0; worker < workers; ++worker) sum += load(sums_memory + worker * WeightSums<T>::size(dim) + offset);
    return sum;
  };
  const auto write_row = [&](S* target, const T* row) {
    for (int64_t c = 0; c < dim; ++c) store_scalar(target + c, row[c]);
  };
  const WeightSums<T> layout(sums_memory, dim);
  const auto offset_of = [&](const T* part) { return part - static_cast<const T*>(sums_memory); };
  const int64_t K = a.batch * P;
  Buffer<T> padded_pooled(a.grad_qkv_weight ? K * padded_dim : 0);
  for (int64_t k = 0; k < K && a.grad_qkv_weight; ++k) {
    std::memcpy(padded_pooled + k * padded_dim, pooled + k * dim, static_cast<size_t>(dim) * sizeof(T));
    for (int64_t c = dim; c < padded_dim; ++c) padded_pooled[k * padded_dim + c] = 0;
  }
  constexpr int64_t kRowsPerTask = 16;
  parallel(ceil_div(dim, kRowsPerTask), [&](int64_t task) {
    const Range rows{task * kRowsPerTask, min_of(dim, (task + 1) * kRowsPerTask)};
    Buffer<T> block(kRowsPerTask * padded_dim);
    if (a.grad_out_weight) {
      S *weight = static_cast<S*>(a.grad_out_weight), *bias = static_cast<S*>(a.grad_out_bias);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        for (int64_t c = 0; c < padded_dim; c += lanes) store(block + c, total(offset_of(layout.out) + r * padded_dim + c));
        write_row(weight + r * dim, block);
        store_scalar(bias + r, reduce_add<T>(total(offset_of(layout.out_bias) + r * lanes)));
      }
    }
    if (!a.grad_qkv_weight) return;
    S *weight = static_cast<S*>(a.grad_qkv_weight), *bias = static_cast<S*>(a.grad_qkv_bias);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      store_scalar(weight + r, reduce_add<T>(total(offset_of(layout.query) + r * lanes)));
      for (int64_t c = 0; c < padded_dim; c += lanes) store(block + c, total(offset_of(layout.value) + r * padded_dim + c));
      write_row(weight + (1 + dim + r) * dim, block);
      store_scalar(bias + 1 + dim + r, reduce_add<T>(total(offset_of(layout.value_bias) + r * lanes)));
      T key_bias = 0;
      for (int64_t k = 0; k < K; ++k) key_bias += all_context_grad[k * dim + r] * mass[k];
      store_scalar(bias + 1 + r, key_bias);
    }
    // dW_k = sum over groups of context_grad (outer) pooled
    gemm<T>(
        rows.end - rows.begin, K, padded_dim / lanes, all_context_grad + rows.begin, 1, dim, padded_pooled.get(), padded_dim,
        [&](int64_t row, int64_t vector, Vec<T> acc) { store(block + row * padded_dim + vector * lanes, acc); });
    for (int64_t r = rows.begin; r < rows.end; ++r) write_row(weight + (1 + r) * dim, block + (r - rows.begin) * padded_dim);
    if (task == 0) store_scalar(bias, T(0));  // a softmax does not change when all its logits shift by b_q
  });
}

// Tiles of 64 tokens, twice the forward's, to halve the traffic of the weight gradients they add to; of 32 where there would be fewer tiles than workers.
template <class S>
void self_backward(const SelfBackward& a) {
  return a.batch * ceil_div(a.height * a.width, 64) < num_threads() ? self_backward_tiled<S, 32>(a) : self_backward_tiled<S, 64>(a);
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
