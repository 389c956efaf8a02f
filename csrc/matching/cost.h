// The matching cost of each target with the queries of its own image (vitkernels/ops/matching/README.md).
#pragma once

#include "matching/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kQueryBlock = 64;

// Up to kQueryBlock predicted boxes, a lane for each.
template <class T>
struct BoxBlock {
  alignas(64) T x[kQueryBlock], y[kQueryBlock], width[kQueryBlock], height[kQueryBlock];

  template <class S>
  void load_boxes(const S* boxes, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      const S* box = boxes + min_of(i, count - 1) * stride;
      x[i] = to_float(box[0]), y[i] = to_float(box[1]), width[i] = to_float(box[2]), height[i] = to_float(box[3]);
    }
  }
};

template <class V>
inline V smaller(V a, V b) { return a < b ? a : b; }

template <class V>
inline V absolute(V v) { return v < V{} ? -v : v; }

// The part of a vector of boxes, or of one, along one axis.
template <class V>
struct Side {
  V low, high;
  Side(V centre, V length) : low(centre - length * 0.5f), high(centre + length * 0.5f) {}
};

// What a target and a vector of queries cost, but for the class.
template <class T>
inline Vec<T> box_cost(const Cost& a, const BoxBlock<T>& block, int64_t i, const T* target) {
  const Vec<T> x = load(block.x + i), y = load(block.y + i), width = load(block.width + i), height = load(block.height + i);
  const Vec<T> distance = absolute(x - target[0]) + absolute(y - target[1]) + absolute(width - target[2]) + absolute(height - target[3]);
  const Side<Vec<T>> across(x, width), down(y, height);
  const Side<Vec<T>> other_across(broadcast(target[0]), broadcast(target[2])), other_down(broadcast(target[1]), broadcast(target[3]));
  const auto area = [](const Side<Vec<T>>& u, const Side<Vec<T>>& v) { return (u.high - u.low) * (v.high - v.low); };
  const auto inside = [](const Side<Vec<T>>& u, const Side<Vec<T>>& v) { return relu(smaller(u.high, v.high) - max_vec(u.low, v.low)); };
  const auto around = [](const Side<Vec<T>>& u, const Side<Vec<T>>& v) { return max_vec(u.high, v.high) - smaller(u.low, v.low); };
  const Vec<T> overlap = inside(across, other_across) * inside(down, other_down), hull = around(across, other_across) * around(down, other_down);
  const Vec<T> together = area(across, down) + area(other_across, other_down) - overlap;
  return static_cast<T>(a.box_weight) * distance - static_cast<T>(a.overlap_weight) * (overlap / together - (hull - together) / hull);
}

template <class T>
inline Vec<T> focal_cost(Vec<T> logit, T alpha, T gamma) {
  const Sigmoid<T> s(logit);
  const T epsilon = static_cast<T>(1e-8);
  return (1 - alpha) * power(s.p, gamma) * log(s.rest + epsilon) - alpha * power(s.rest, gamma) * log(s.p + epsilon);
}

// Queries [first, first + count) of an image and all of its targets. Each row of logits is read once: what its image's labels need of it (a probability, or
// the logit itself) goes into a panel [target][query], which then is what one target costs a vector of queries at a time.
template <class S>
void cost_block(const Cost& a, int64_t layer, int64_t image, int64_t first) {
  using T = Arith<S>;
  const int64_t begin = a.cu_targets[image], targets = a.cu_targets[image + 1] - begin, count = min_of(kQueryBlock, a.queries - first);
  const int64_t* labels = a.labels + begin;
  Buffer<T> panel_memory(targets * kQueryBlock), row_memory(round_up(a.classes, kLanes<T>));
  T *panel = panel_memory, *row = row_memory;
  for (int64_t q = 0; q < kQueryBlock; ++q) {
    const S* logits = logits_of<S>(a, layer, image, first + min_of(q, count - 1));
    if (a.focal) {
      for (int64_t t = 0; t < targets; ++t) panel[t * kQueryBlock + q] = to_float(logits[labels[t]]);
    } else if (q < count) {
      load_logits(logits, a.classes, -kInfinity<T>, row);
      T largest;
      const T inverse = -static_cast<T>(a.class_weight) / exponentials(row, a.classes, &largest);
      for (int64_t t = 0; t < targets; ++t) panel[t * kQueryBlock + q] = row[labels[t]] * inverse;
    } else {
      for (int64_t t = 0; t < targets; ++t) panel[t * kQueryBlock + q] = 0;
    }
  }
  BoxBlock<T> boxes;
  boxes.load_boxes(box_of<S>(a, layer, image, first), a.boxes_query, count);
  for (int64_t t = 0; t < targets; ++t) {
    const T* target = static_cast<const T*>(a.target_boxes) + (begin + t) * 4;
    T* costs = static_cast<T*>(a.costs) + (layer * a.targets + begin + t) * a.queries + first;
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      Vec<T> cost = load(panel + t * kQueryBlock + i);
      if (a.focal) cost = static_cast<T>(a.class_weight) * focal_cost<T>(cost, static_cast<T>(a.alpha), static_cast<T>(a.gamma));
      store_row(costs + i, cost + box_cost<T>(a, boxes, i, target), count - i);
    }
  }
}

template <class S>
void cost(const Cost& a) {
  const int64_t blocks = ceil_div(a.queries, kQueryBlock);
  for_tasks(a, a.layers * a.images * blocks, [&](int64_t i) {
    const int64_t image = i / blocks % a.images;
    if (a.cu_targets[image] < a.cu_targets[image + 1]) cost_block<S>(a, i / blocks / a.images, image, i % blocks * kQueryBlock);
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
