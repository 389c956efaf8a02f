// The set loss and its gradients: a query's class against its target's or no object, its box against its target's (vitkernels/ops/matching/README.md).
#pragma once

#include "matching/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kRowBlock = 32;  // queries whose losses are summed in one task, however many threads there are

// A box along one axis, its target along the same axis, and the gradients of what is made of both.
template <class T>
struct Axis {
  T low, high, other_low, other_high;
  T raw, inside, around;  // what the boxes share, negative where they are apart; the same, at least 0; what holds both

  Axis(T centre, T length, T other_centre, T other_length)
      : low(centre - T(0.5) * length), high(centre + T(0.5) * length), other_low(other_centre - T(0.5) * other_length),
        other_high(other_centre + T(0.5) * other_length) {
    raw = (other_high < high ? other_high : high) - (other_low > low ? other_low : low);
    inside = raw < 0 ? T(0) : raw;
    around = (other_high > high ? other_high : high) - (other_low < low ? other_low : low);
  }

  T length() const { return high - low; }
  T other_length() const { return other_high - other_low; }

  // How much of a gradient of max(a, b) is a's; of equals both have a half. That of min(a, b) is share(b, a).
  static T share(T a, T b) { return a == b ? T(0.5) : a > b ? T(1) : T(0); }

  // Gradients of the box's centre and length, from those of its length as measured between the corners, of `inside` and of `around`.
  void gradient(T of_length, T of_inside, T of_around, T* of_centre, T* of_size) const {
    const T within = raw >= 0 ? of_inside : T(0);
    const T of_high = of_length + within * share(other_high, high) + of_around * share(high, other_high);
    const T of_low = -of_length - within * share(low, other_low) - of_around * share(other_low, low);
    *of_centre += of_low + of_high;
    *of_size += T(0.5) * (of_high - of_low);
  }
};

// A matched box.
template <class T>
struct Pair {
  T box[4];
  const T* target;
  Axis<T> x, y;
  T overlap, together, hull;

  template <class S>
  Pair(const S* from, const T* target_box)
      : box{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}, target(target_box),
        x(box[0], box[2], target[0], target[2]), y(box[1], box[3], target[1], target[3]) {
    overlap = x.inside * y.inside;
    together = x.length() * y.length() + x.other_length() * y.other_length() - overlap;
    hull = x.around * y.around;
  }

  T distance() const {
    T sum = 0;
    for (int i = 0; i < 4; ++i) sum += std::fabs(box[i] - target[i]);
    return sum;
  }

  T loss() const { return 1 - (overlap / together - (hull - together) / hull); }

  // of_distance and of_loss are the gradients of distance() and of loss().
  template <class S>
  void gradient(T of_distance, T of_loss, S* out) const {
    T grad[4];
    for (int i = 0; i < 4; ++i) {
      const T difference = box[i] - target[i];
      grad[i] = difference > 0 ? of_distance : difference < 0 ? -of_distance : T(0) * difference;
    }
    const T of_together = of_loss * (overlap / (together * together) - 1 / hull), of_overlap = -of_loss / together - of_together;
    const T of_hull = of_loss * together / (hull * hull);
    x.gradient(of_together * y.length(), of_overlap * y.inside, of_hull * y.around, grad, grad + 2);
    y.gradient(of_together * x.length(), of_overlap * x.inside, of_hull * x.around, grad + 1, grad + 3);
    for (int i = 0; i < 4; ++i) store_scalar(out + i, grad[i]);
  }
};

// One query: where it is, and its target.
template <class S>
struct Query {
  const S *logits, *box;
  int64_t match, label;  // label: of the target; without one no object, which under focal is none of the classes

  Query(const Loss& a, int64_t layer, int64_t row) {
    const int64_t image = row / a.queries, query = row % a.queries;
    logits = logits_of<S>(a, layer, image, query), box = box_of<S>(a, layer, image, query);
    match = a.matches[layer * a.images * a.queries + row];
    label = match >= 0 ? a.labels[match] : a.focal ? -1 : a.classes - 1;
  }

  Arith<S> weight(const Loss& a) const { return static_cast<Arith<S>>(label == a.classes - 1 ? a.eos_coef : 1.0); }
  Pair<Arith<S>> pair(const Loss& a) const { return {box, static_cast<const Arith<S>*>(a.target_boxes) + match * 4}; }
};

// The focal loss of an example against a class, and its derivative. An example of it is one against it with the logit's sign turned.
template <class T>
struct Focal {
  Sigmoid<T> s;
  Vec<T> modulated;
  T gamma;

  Focal(Vec<T> x, T alpha, T focus) : s(x), modulated(alpha * power(s.p, focus)), gamma(focus) {}
  Vec<T> loss() const { return modulated * s.softplus; }
  Vec<T> derivative() const { return modulated * (gamma * s.rest * s.softplus + s.p); }
};

// A logit that adds nothing to the focal loss.
template <class T>
constexpr T kNothing = T(-1e4);

template <class S>
Arith<S> focal_loss(const Loss& a, const Query<S>& query, Arith<S>* row) {
  using T = Arith<S>;
  const T alpha = static_cast<T>(a.alpha), gamma = static_cast<T>(a.gamma);
  load_logits(query.logits, a.classes, kNothing<T>, row);
  T of_label = 0;
  if (query.label >= 0) {
    of_label = Focal<T>(broadcast(-row[query.label]), alpha, gamma).loss()[0];
    row[query.label] = kNothing<T>;
  }
  Vec<T> sum{};
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) sum += Focal<T>(load(row + c), 1 - alpha, gamma).loss();
  return of_label + reduce_add<T>(sum);
}

template <class S>
void focal_gradient(const Loss& a, const Query<S>& query, Arith<S> grad, Arith<S>* row, S* out) {
  using T = Arith<S>;
  const T alpha = static_cast<T>(a.alpha), gamma = static_cast<T>(a.gamma);
  load_logits(query.logits, a.classes, kNothing<T>, row);
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) {
    store_row(out + c, grad * Focal<T>(load(row + c), 1 - alpha, gamma).derivative(), a.classes - c);
  }
  if (query.label >= 0) store_scalar(out + query.label, -grad * Focal<T>(broadcast(-row[query.label]), alpha, gamma).derivative()[0]);
}

template <class S>
Arith<S> cross_entropy(const Loss& a, const Query<S>& query, Arith<S>* row) {
  using T = Arith<S>;
  load_logits(query.logits, a.classes, -kInfinity<T>, row);
  T largest;
  const T logit = row[query.label], sum = exponentials(row, a.classes, &largest);
  return std::log(sum) + (largest - logit);
}

template <class S>
void cross_entropy_gradient(const Loss& a, const Query<S>& query, Arith<S> grad, Arith<S>* row, S* out) {
  using T = Arith<S>;
  load_logits(query.logits, a.classes, -kInfinity<T>, row);
  T largest;
  const T inverse = 1 / exponentials(row, a.classes, &largest);
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) store(row + c, load(row + c) * inverse);
  row[query.label] -= 1;
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) store_row(out + c, grad * load(row + c), a.classes - c);
}

// The four sums of a block of queries, or of a layer, in double: which queries are in a block depends on no thread, nor does the order of the sums.
struct Sums {
  double loss, weight, distance, overlap;
};

template <class S>
Sums sums_of_block(const LossForward& a, int64_t layer, Range rows) {
  using T = Arith<S>;
  Buffer<T> row(round_up(a.classes, kLanes<T>));
  Sums sums{};
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Query<S> query(a, layer, i);
    if (a.focal) {
      sums.loss += focal_loss(a, query, row.get());
    } else {
      const T weight = query.weight(a);
      sums.loss += weight * cross_entropy(a, query, row.get()), sums.weight += weight;
    }
    if (query.match < 0) continue;
    const Pair<T> pair = query.pair(a);
    sums.distance += pair.distance(), sums.overlap += pair.loss();
  }
  return sums;
}

template <class S>
void loss_forward(const LossForward& a) {
  using T = Arith<S>;
  const int64_t rows = a.images * a.queries, blocks = ceil_div(rows, kRowBlock);
  Buffer<Sums> sums(a.layers * blocks);
  for_tasks(a, a.layers * blocks, [&](int64_t i) {
    const int64_t first = i % blocks * kRowBlock;
    sums[i] = sums_of_block<S>(a, i / blocks, {first, min_of(first + kRowBlock, rows)});
  });
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    Sums total{};
    for (int64_t i = layer * blocks; i < (layer + 1) * blocks; ++i) {
      total.loss += sums[i].loss, total.weight += sums[i].weight, total.distance += sums[i].distance, total.overlap += sums[i].overlap;
    }
    const double divisor = a.focal ? a.num_boxes : total.weight;
    T* losses = static_cast<T*>(a.losses) + layer * 3;
    losses[0] = static_cast<T>(total.loss / divisor), losses[1] = static_cast<T>(total.distance / a.num_boxes);
    losses[2] = static_cast<T>(total.overlap / a.num_boxes);
    static_cast<T*>(a.divisors)[layer] = static_cast<T>(divisor);
  }
}

template <class S>
void gradients_of_block(const LossBackward& a, int64_t layer, Range rows) {
  using T = Arith<S>;
  Buffer<T> row(round_up(a.classes, kLanes<T>));
  const T *grads = static_cast<const T*>(a.grad_losses) + layer * 3, num_boxes = static_cast<T>(a.num_boxes);
  const T of_class = grads[0] / static_cast<const T*>(a.divisors)[layer], of_distance = grads[1] / num_boxes, of_overlap = grads[2] / num_boxes;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Query<S> query(a, layer, i);
    const int64_t place = layer * a.images * a.queries + i;
    S *grad_logits = static_cast<S*>(a.grad_logits) + place * a.classes, *grad_box = static_cast<S*>(a.grad_boxes) + place * 4;
    if (a.focal) {
      focal_gradient(a, query, of_class, row.get(), grad_logits);
    } else {
      cross_entropy_gradient(a, query, of_class * query.weight(a), row.get(), grad_logits);
    }
    if (query.match >= 0) {
      query.pair(a).gradient(of_distance, of_overlap, grad_box);
    } else {
      std::memset(static_cast<void*>(grad_box), 0, 4 * sizeof(S));
    }
  }
}

template <class S>
void loss_backward(const LossBackward& a) {
  const int64_t rows = a.images * a.queries, blocks = ceil_div(rows, kRowBlock);
  for_tasks(a, a.layers * blocks, [&](int64_t i) {
    const int64_t first = i % blocks * kRowBlock;
    gradients_of_block<S>(a, i / blocks, {first, min_of(first + kRowBlock, rows)});
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
