// What cost and loss share: rows of logits in the arithmetic type, softmax and focal terms a vector at a time.
#pragma once

#include "common/heads.h"
#include "common/rows.h"
#include "common/tile.h"
#include "matching/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace matching;

constexpr int64_t kSerialLogits = 1 << 15;  // below, a second thread costs more than it saves

// body(i) for i in [0, tasks), on this thread alone where there are few logits.
template <class Body>
void for_tasks(const Detection& a, int64_t tasks, const Body& body) {
  parallel_if(a.layers * a.images * a.queries * a.classes >= kSerialLogits, tasks, body);
}

template <class S>
const S* logits_of(const Detection& a, int64_t layer, int64_t image, int64_t query) {
  return static_cast<const S*>(a.logits) + layer * a.logits_layer + image * a.logits_image + query * a.logits_query;
}

template <class S>
const S* box_of(const Detection& a, int64_t layer, int64_t image, int64_t query) {
  return static_cast<const S*>(a.boxes) + layer * a.boxes_layer + image * a.boxes_image + query * a.boxes_query;
}

template <class S>
bool has_negative_side(const Detection& a) {
  bool found = false;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    for (int64_t image = 0; image < a.images; ++image) {
      for (int64_t q = 0; q < a.queries; ++q) {
        const S* box = box_of<S>(a, layer, image, q);
        found |= to_float(box[2]) < 0 || to_float(box[3]) < 0;
      }
    }
  }
  const auto* target = static_cast<const Arith<S>*>(a.target_boxes);
  for (int64_t t = 0; t < a.targets; ++t, target += 4) found |= target[2] < 0 || target[3] < 0;
  return found;
}

// A row of logits in whole vectors, the last one filled up.
template <class S>
void load_logits(const S* logits, int64_t classes, Arith<S> fill, Arith<S>* row) {
  using T = Arith<S>;
  const int64_t whole = classes / kLanes<T> * kLanes<T>;
  if (whole < classes) store(row + whole, broadcast(fill));
  upcast(logits, classes, row);
}

// A row to e^(x - max), and their sum. A row that holds a NaN, or nothing but -inf, has NaN for a sum, as softmax has.
template <class T>
T exponentials(T* row, int64_t classes, T* largest) {
  Vec<T> most = load(row);
  for (int64_t c = kLanes<T>; c < classes; c += kLanes<T>) most = max_vec(most, load(row + c));
  *largest = reduce_max<T>(most);
  Vec<T> sum{};
  for (int64_t c = 0; c < classes; c += kLanes<T>) {
    const Vec<T> e = exp_nonpositive(load(row + c) - *largest);
    store(row + c, e);
    sum += first_lanes<T>(e, classes - c, T(0));
  }
  return reduce_add<T>(sum);
}

// log(v) for finite v > 0 that is no denormal, within 1 ulp: v = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and a polynomial in f.
inline Vec<float> log(Vec<float> v) {
  const auto bits = reinterpret_cast<IndexVec<float>>(v);
  const auto n = (bits - 0x3f3504f3) >> 23;
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (n << 23)) - 1.0f, exponent = __builtin_convertvector(n, Vec<float>), square = f * f;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  // ln 2 in two parts, of which the first times n is exact.
  const Vec<float> result = p * f * square - exponent * 2.12194440e-4f - 0.5f * square + f + exponent * 0.693359375f;
  return v != v ? v : result;
}
inline Vec<double> log(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::log(v[i]);
  return v;
}

// v^gamma for v in [0, 1].
template <class T>
Vec<T> power(Vec<T> v, T gamma) {
  if (gamma == 2) return v * v;
  if (gamma == 1) return v;
  if (gamma == 0) return broadcast(T(1));
  const Vec<T> smallest = broadcast(T(1e-37));
  return exp(gamma * log(v < smallest ? smallest : v));
}

// p = sigmoid(x), 1 - p without cancellation, and log(1 + e^x).
template <class T>
struct Sigmoid {
  Vec<T> p, rest, softplus;

  explicit Sigmoid(Vec<T> x) {
    const Vec<T> zero{}, e = exp_nonpositive(x < zero ? x : -x), one_more = e + T(1), near = T(1) / one_more, far = e * near;
    p = x < zero ? far : near, rest = x < zero ? near : far;
    // log(1 + e): what the sum lost in rounding is added to its logarithm.
    softplus = (x < zero ? zero : x) + log(one_more) + (e - (one_more - T(1))) * near;
  }
};

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
