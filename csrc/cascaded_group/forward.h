// Forward of cascaded group attention: a window at a time, all heads in cascade, its tokens in cache.
#pragma once

#include "cascaded_group/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// The activations of a window. `copies` of what one head hands to itself: two where workers share a window, so that one may start on the next head.
template <class T>
struct WindowMemory {
  T *x, *f, *cat, *out;
  Projected<T> projected[2];

  static bool reuses_x(const Layout<T>& l) { return l.x_row == l.channel_row; }
  static int64_t size(const Layout<T>& l, int64_t copies) {
    const int64_t row = l.x_row + l.split_row + l.cat_row + (reuses_x(l) ? 0 : l.channel_row) + copies * l.kv_row;
    return l.tokens * row + copies * l.grid_size;
  }
  WindowMemory(const Layout<T>& l, T* memory, int64_t copies) {
    const auto take = [&](int64_t count) { return memory += count, memory - count; };
    x = take(l.tokens * l.x_row), f = take(l.tokens * l.split_row), cat = take(l.tokens * l.cat_row);
    out = reuses_x(l) ? x : take(l.tokens * l.channel_row);  // the projection comes when x is no longer needed
    for (int64_t i = 0; i < 2; ++i) projected[i] = i < copies ? Projected<T>{take(l.grid_size), take(l.tokens * l.kv_row)} : projected[0];
  }
  // The margins of the grids, which are never written again.
  void clear(const Layout<T>& l) const {
    std::memset(projected[0].grid, 0, static_cast<size_t>(l.grid_size) * sizeof(T));
    if (projected[1].grid != projected[0].grid) std::memset(projected[1].grid, 0, static_cast<size_t>(l.grid_size) * sizeof(T));
  }
};

template <class T>
struct WorkerMemory {
  T *q, *q_transposed, *scores, *inverse_sum;

  static int64_t size(const Layout<T>& l) { return l.tokens * (l.key_row + l.token_row) + l.key_row * l.token_row + l.token_row; }
  WorkerMemory(const Layout<T>& l, T* memory)
      : q(memory), q_transposed(q + l.tokens * l.key_row), scores(q_transposed + l.key_row * l.token_row), inverse_sum(scores + l.tokens * l.token_row) {}
};

template <class T>
struct ForwardPass {
  static constexpr int64_t lanes = kLanes<T>;

  const Forward& a;
  const Layout<T>& l;
  const Weights<T>& weights;

  void load_heads(int64_t window, Range heads, const WindowMemory<T>& m) const {
    const Window at(a.x, l, a.height, a.width, window, heads.begin * l.split);
    l.io.load_window(at, l.window, {heads.end - heads.begin, l.split, l.split_row, l.x_row}, m.x + heads.begin * l.split_row);
  }

  void project_head(int64_t head, Range tokens, const WindowMemory<T>& m) const {
    const T* f = head == 0 ? m.x : m.f;
    project<T>(l, weights.head(head), f, head == 0 ? l.x_row : l.split_row, tokens.begin, tokens.end, 0, l.qkv_row / lanes, m.projected[head % 2]);
  }

  void attend(int64_t head, Range tokens, const WindowMemory<T>& m, const WorkerMemory<T>& own) const {
    const HeadWeights<T> w = weights.head(head);
    const Projected<T>& in = m.projected[head % 2];
    convolve(l, in.grid, w.kernel, w.dw, tokens.begin, tokens.end, [&](int64_t token, int64_t vector, Vec<T> acc) {
      store(own.q + token * l.key_row + vector * lanes, acc + load(w.dw_bias + vector * lanes));
    });
    transpose_tokens(own.q, l.key_row, tokens.begin, tokens.end, l.key_row, own.q_transposed);
    attention_scores(l, w, in.kv, l.kv_row, own.q_transposed, tokens.begin, tokens.end, own.scores, own.inverse_sum);
    const bool feeds = head + 1 < l.heads;
    T* cat = m.cat + tokens.begin * l.cat_row + head * l.value_row;
    const T* next_split = m.x + tokens.begin * l.x_row + (head + 1) * l.split_row;
    T* next = m.f + tokens.begin * l.split_row;
    const T* values = in.kv + l.key_row;
    gemm<T>(tokens.end - tokens.begin, l.tokens, l.value_row / lanes, own.scores, 1, round_up(tokens.end - tokens.begin, lanes), values, l.kv_row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      const Vec<T> out = acc * own.inverse_sum[row];
      store(cat + row * l.cat_row + vector * lanes, relu(out));
      if (feeds) store(next + row * l.split_row + vector * lanes, out + load(next_split + row * l.x_row + vector * lanes));
    });
  }

  // The vectors [from, to) of the output's channels, of all tokens.
  void project_out(Range vectors, const WindowMemory<T>& m) const {
    const Panel<T> proj = weights.proj();
    const int64_t first = vectors.begin * lanes;
    const T* bias = weights.proj_bias() + first;
    T* out = m.out + first;
    gemm<T>(l.tokens, l.cat_row, vectors.end - vectors.begin, m.cat, l.cat_row, 1, proj.data + first, proj.row, [&](int64_t row, int64_t vector, Vec<T> acc) {
      store(out + row * l.channel_row + vector * lanes, acc + load(bias + vector * lanes));
    });
  }

  void store_channels(int64_t window, Range vectors, const WindowMemory<T>& m) const {
    const int64_t first = vectors.begin * lanes, count = min_of(vectors.end * lanes, l.channels) - first;
    if (count <= 0) return;
    const Window at(a.y, l, a.height, a.width, window, first);
    l.io.store_window(at, l.window, {1, count, round_up(count, lanes), l.channel_row}, m.out + first, a.add);
  }

  // Each worker takes a share of the windows, one after the other.
  void by_window(int64_t workers) const {
    parallel(workers, [&](int64_t worker) {
      const int64_t window_size = WindowMemory<T>::size(l, 1);
      Buffer<T> memory(window_size + WorkerMemory<T>::size(l));
      const WindowMemory<T> m(l, memory, 1);
      const WorkerMemory<T> own(l, memory + window_size);
      m.clear(l);
      const Range range = share(l.windows, worker, workers), all = {0, l.tokens};
      for (int64_t window = range.begin; window < range.end; ++window) {
        load_heads(window, {0, l.heads}, m);
        for (int64_t head = 0; head < l.heads; ++head) {
          project_head(head, all, m);
          attend(head, all, m, own);
        }
        project_out({0, l.channel_row / lanes}, m);
        store_channels(window, {0, l.channel_row / lanes}, m);
      }
    });
  }

  // Fewer windows than workers: `parts` workers share the tokens of each, in step. A worker goes from one head to the next with its own tokens: only the
  // keys and values come from the others, and so does what the convolution of q reads.
  void by_tokens(int64_t parts) const {
    const int64_t window_size = round_up(WindowMemory<T>::size(l, 2), lanes), worker_size = round_up(WorkerMemory<T>::size(l), lanes);
    Buffer<T> memory(l.windows * (window_size + parts * worker_size));
    const auto step = [&](const auto& body) {
      parallel(l.windows * parts, [&](int64_t task) {
        const int64_t window = task / parts, part = task % parts;
        const WindowMemory<T> m(l, memory + window * window_size, 2);
        const WorkerMemory<T> own(l, memory + l.windows * window_size + task * worker_size);
        body(window, part, share(l.tokens, part, parts), m, own);
      });
    };
    step([&](int64_t window, int64_t part, Range, const WindowMemory<T>& m, const WorkerMemory<T>&) {
      if (part == 0) m.clear(l);
      load_heads(window, share(l.heads, part, parts), m);
    });
    step([&](int64_t, int64_t, Range tokens, const WindowMemory<T>& m, const WorkerMemory<T>&) { project_head(0, tokens, m); });
    for (int64_t head = 0; head < l.heads; ++head) {
      step([&](int64_t, int64_t, Range tokens, const WindowMemory<T>& m, const WorkerMemory<T>& own) {
        attend(head, tokens, m, own);
        if (head + 1 < l.heads) project_head(head + 1, tokens, m);
      });
    }
    // By channels, of which each reads its part of the weights once. x, which may be what is overwritten, has been read.
    step([&](int64_t window, int64_t part, Range, const WindowMemory<T>& m, const WorkerMemory<T>&) {
      const int64_t vectors = l.channel_row / lanes;
      const Range pairs = share(ceil_div(vectors, 2), part, parts), own = {2 * pairs.begin, min_of(2 * pairs.end, vectors)};
      project_out(own, m);
      store_channels(window, own, m);
    });
  }
};

template <class T>
void forward(const Forward& a) {
  const Layout<T> l(a);
  const Weights<T> weights(a, l, a.proj_bias);
  const ForwardPass<T> pass{a, l, weights};
  if (l.windows == 0) return;
  const int64_t threads = num_threads(), parts = min_of(threads / l.windows, ceil_div(l.tokens, 8));
  if (parts > 1) {
    pass.by_tokens(parts);
  } else {
    pass.by_window(min_of(threads, l.windows));
  }
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
