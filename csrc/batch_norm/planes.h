// Contiguous maps: a channel's pixels are neighbours, and lanes are pixels. A worker takes whole channels: their second pass finds them in the cache.
#pragma once

#include "batch_norm/shared.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

// body(values, count) for the runs of neighbouring pixels of a channel, in a fixed order: offsets into a map.
template <class S, class Body>
inline void for_runs(const Norm& a, int64_t channel, const Body& body) {
  constexpr int64_t longest = kBlockBytes / static_cast<int64_t>(sizeof(Arith<S>));
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t plane = (b * a.channels + channel) * a.pixels;
    for (int64_t first = 0; first < a.pixels; first += longest) body(plane + first, min_of(longest, a.pixels - first));
  }
}

// The moments of a channel, joined run by run: the deviations of each run are from its own mean, so nothing cancels, however far from 0 the values are.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void join(double other_count, double other_mean, double other_squares) {
    const double total = count + other_count, apart = other_mean - mean, part = other_count / total;
    mean += apart * part;
    squares += other_squares + apart * apart * count * part;
    count = total;
  }
};

// Adds to kSums sums over the values of a run: body(i, left, part) for the vector at i.
template <class T, int kSums, class Body>
inline void sum_run(int64_t count, double (&sums)[kSums], const Body& body) {
  double lanes[kSums][kLanes<T>] = {};
  for (int64_t first = 0; first < count; first += kSumLength * kLanes<T>) {
    Vec<T> part[kSums] = {};
    const int64_t end = min_of(first + kSumLength * kLanes<T>, count);
    for (int64_t i = first; i < end; i += kLanes<T>) body(i, count - i, part);
    for (int k = 0; k < kSums; ++k) add_to<T>(lanes[k], part[k]);
  }
  for (int k = 0; k < kSums; ++k) {
    for (const double lane : lanes[k]) sums[k] += lane;
  }
}

template <class S>
void run_moments(const S* x, int64_t count, Moments& all) {
  using T = Arith<S>;
  double sum[1] = {}, squares[1] = {};
  sum_run<T>(count, sum, [&](int64_t i, int64_t left, auto& part) { part[0] += load_row(x + i, left); });
  const double exact = sum[0] / static_cast<double>(count);
  const T mean = static_cast<T>(exact);
  sum_run<T>(count, squares, [&](int64_t i, int64_t left, auto& part) {
    const Vec<T> apart = first_lanes<T>(load_row(x + i, left) - mean, left, T(0));
    part[0] += apart * apart;
  });
  all.join(static_cast<double>(count), exact, squares[0]);
}

template <class S, Activation kActivation>
void forward_planes(const Forward& a) {
  using T = Arith<S>;
  const S* x = static_cast<const S*>(a.x);
  S* y = static_cast<S*>(a.y);
  shared_out(a.channels, a.batch * a.channels * a.pixels, [&](int64_t c) {
    Moments all;
    for_runs<S>(a, c, [&](int64_t at, int64_t count) { run_moments<S>(x + at, count, all); });
    const T mean = static_cast<T>(all.mean), var = static_cast<T>(all.squares / all.count);
    static_cast<T*>(a.mean)[c] = mean;
    static_cast<T*>(a.var)[c] = var;
    const Affine<T, T> affine{mean, static_cast<const T*>(a.weight)[c] * inverse_deviation(var, a.eps), static_cast<const T*>(a.bias)[c]};
    for_runs<S>(a, c, [&](int64_t at, int64_t count) {
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        store_row(y + at + i, activate<kActivation, T>(affine(load_row(x + at + i, count - i))), count - i);
      }
    });
  });
}

template <class S, Activation kActivation>
void backward_planes(const Backward& a) {
  using T = Arith<S>;
  const S *x = static_cast<const S*>(a.x), *grad_y = static_cast<const S*>(a.grad_y);
  S* grad_x = static_cast<S*>(a.grad_x);
  shared_out(a.channels, a.batch * a.channels * a.pixels, [&](int64_t c) {
    const T mean = static_cast<const T*>(a.mean)[c], inverse = inverse_deviation(static_cast<const T*>(a.var)[c], a.eps);
    const Affine<T, T> affine{mean, static_cast<const T*>(a.weight)[c] * inverse, static_cast<const T*>(a.bias)[c]};
    double sums[2] = {};  // of gradients, and of gradients times deviations; where a run has no pixels the gradient is 0, and so are both
    for_runs<S>(a, c, [&](int64_t at, int64_t count) {
      sum_run<T>(count, sums, [&](int64_t i, int64_t left, auto& part) {
        const Vec<T> value = load_row(x + at + i, left);
        const Vec<T> grad = times_slope<kActivation, T>(load_row(grad_y + at + i, left), affine(value));
        part[0] += grad;
        part[1] += grad * (value - mean);
        if (kKeepsSlope<kActivation> && grad_x) store_row(grad_x + at + i, grad, left);
      });
    });
    const double grads = sums[0], products = sums[1];
    const double count = static_cast<double>(a.batch * a.pixels);
    static_cast<T*>(a.grad_bias)[c] = static_cast<T>(grads);
    static_cast<T*>(a.grad_weight)[c] = static_cast<T>(products * static_cast<double>(inverse));
    if (!grad_x) return;
    const T of_grad = static_cast<T>(grads / count), of_x = static_cast<T>(products * static_cast<double>(inverse) * static_cast<double>(inverse) / count);
    for_runs<S>(a, c, [&](int64_t at, int64_t run) {
      for (int64_t i = 0; i < run; i += kLanes<T>) {
        const Vec<T> value = load_row(x + at + i, run - i);
        const Vec<T> grad = kKeepsSlope<kActivation> ? load_row(grad_x + at + i, run - i) : times_slope<kActivation, T>(load_row(grad_y + at + i, run - i), affine(value));
        store_row(grad_x + at + i, (grad - of_grad - (value - mean) * of_x) * affine.scale, run - i);
      }
    });
  });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
