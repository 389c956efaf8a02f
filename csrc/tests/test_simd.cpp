// Conversions, partial loads and stores, reductions, transposes and exp of one instruction set, against definitions in plain double arithmetic.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "per_isa.h"

namespace vitkernels::test {
namespace {

using namespace vitkernels::VITKERNELS_ISA;

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The value of a 16-bit float with that many exponent and fraction bits, from the definition of the format.
template <int kExponent, int kFraction>
double value_of(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> kFraction & ((1 << kExponent) - 1), fraction = bits & ((1 << kFraction) - 1);
  const int bias = (1 << (kExponent - 1)) - 1;
  double magnitude;
  if (exponent == (1 << kExponent) - 1) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - kFraction);
  } else {
    magnitude = std::ldexp(fraction + (1 << kFraction), exponent - bias - kFraction);
  }
  return sign ? -magnitude : magnitude;
}

template <class S>
double stored_value(S value);
template <>
double stored_value(BFloat16 value) { return value_of<8, 7>(value.bits); }
template <>
double stored_value(Float16 value) { return value_of<5, 10>(value.bits); }

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

// Every 16-bit pattern, through the scalar and the vector load.
template <class S>
void loads_are_exact() {
  std::vector<S> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = S{static_cast<uint16_t>(i)};
  for (int i = 0; i < 65536; i += kFloatLanes) {
    const Vec<float> v = load(&all[i]);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const double want = stored_value(all[i + lane]);
      CHECK(same(v[lane], want), "pattern %04x: vector load %g, want %g", i + lane, v[lane], want);
      CHECK(same(to_float(all[i + lane]), want), "pattern %04x: to_float %g, want %g", i + lane, to_float(all[i + lane]), want);
    }
  }
}

// The pattern of |value| rounded to nearest, ties to the even pattern, by looking it up among all non-negative values of the format. Infinity stands
// in the table where the next finite value would be, which is how IEEE 754 decides what overflows.
template <class S>
uint16_t nearest_pattern(double magnitude) {
  static const std::vector<double> table = [] {
    std::vector<double> values;
    for (uint16_t pattern = 0; std::isfinite(stored_value(S{pattern})); ++pattern) values.push_back(stored_value(S{pattern}));
    values.push_back(2 * values[values.size() - 1] - values[values.size() - 2]);
    return values;
  }();
  const size_t last = table.size() - 1;
  if (magnitude >= table[last]) return static_cast<uint16_t>(last);
  const size_t above = static_cast<size_t>(std::upper_bound(table.begin(), table.end(), magnitude) - table.begin());
  const double middle = (table[above - 1] + table[above]) / 2;
  if (magnitude != middle) return static_cast<uint16_t>(magnitude < middle ? above - 1 : above);
  return static_cast<uint16_t>(above % 2 == 0 ? above : above - 1);
}

template <class S>
void check_rounding(float value) {
  S stored[kFloatLanes];
  float lanes[kFloatLanes];
  for (float& lane : lanes) lane = value;
  store(stored, load(lanes));
  for (const S got : {from_float<S>(value), stored[0], stored[kFloatLanes - 1]}) {
    if (std::isnan(value)) {
      CHECK(std::isnan(stored_value(got)), "a NaN (%08x) became %04x", bits_of(value), got.bits);
      continue;
    }
    const int want = nearest_pattern<S>(std::fabs(static_cast<double>(value))) | (std::signbit(value) ? 0x8000 : 0);
    CHECK(got.bits == want, "%a became %04x, want %04x", value, got.bits, want);
  }
}

template <class S>
void stores_round_to_nearest_even() {
  // Around every representable value: itself, the midpoint to the next, and the floats on either side of both.
  for (uint16_t pattern = 0; std::isfinite(stored_value(S{pattern})); ++pattern) {
    const double low = stored_value(S{pattern}), high = stored_value(S{static_cast<uint16_t>(pattern + 1)});
    const float here = static_cast<float>(low);
    const float middle = std::isfinite(high) ? static_cast<float>((low + high) / 2) : here;
    for (const float value : {here, middle}) {
      for (const float near : {std::nextafterf(value, 0.0f), value, std::nextafterf(value, INFINITY)}) {
        check_rounding<S>(near);
        check_rounding<S>(-near);
      }
    }
  }
  for (const float value : {INFINITY, -INFINITY, NAN, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(), float_of(0x7f800001),
                            float_of(0x7fffffff), float_of(0xffffffff), 65519.996f, 65520.0f, 0x1p-25f, 0x1.000002p-25f}) {
    check_rounding<S>(value);
  }
}

template <class S>
void partial_access_stays_in_bounds() {
  using T = Arith<S>;
  constexpr int lanes = kLanes<T>;
  for (int n = 0; n <= lanes; ++n) {
    // Exactly n elements on the heap: the address sanitizer sees one too many.
    std::vector<S> source, target;
    source.reserve(n == 0 ? 1 : n);  // memory to point to, also for no element
    target.reserve(n == 0 ? 1 : n);
    source.resize(n);
    target.resize(n);
    for (int i = 0; i < n; ++i) store_scalar(&source[i], static_cast<T>(i + 1));
    const Vec<T> v = load_partial(source.data(), n);
    for (int i = 0; i < lanes; ++i) CHECK(v[i] == (i < n ? i + 1 : 0), "lane %d of %d is %g", i, n, static_cast<double>(v[i]));
    store_partial(target.data(), v, n);
    for (int i = 0; i < n; ++i) CHECK(to_float(target[i]) == i + 1, "element %d of %d is %g", i, n, static_cast<double>(to_float(target[i])));
    std::vector<S> guarded(lanes + 1);
    for (S& element : guarded) store_scalar(&element, static_cast<T>(-1));
    store_partial(guarded.data(), v, n);
    for (int i = n; i <= lanes; ++i) CHECK(to_float(guarded[i]) == -1, "element %d was written by a store of %d", i, n);
  }
}

template <class T>
void reductions_and_transposes() {
  constexpr int n = kLanes<T>;
  Random random(7);
  Vec<T> v;
  double sum = 0, magnitude = 0;
  for (int i = 0; i < n; ++i) {
    v[i] = static_cast<T>(random.next());
    sum += v[i];
    magnitude += std::fabs(v[i]);
  }
  CHECK(std::fabs(reduce_add<T>(v) - sum) <= n * (sizeof(T) == 4 ? 0x1p-24 : 0x1p-53) * magnitude, "sum %g, want %g", double(reduce_add<T>(v)), sum);
  for (int lane = 0; lane < n; ++lane) {
    Vec<T> one{};
    one[lane] = 3;
    CHECK(reduce_add<T>(one) == 3, "lane %d is not summed once", lane);
    CHECK(broadcast<T>(static_cast<T>(lane) / 3)[lane] == static_cast<T>(lane) / 3, "broadcast, lane %d", lane);
  }
  Vec<T> rows[n];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) rows[i][j] = static_cast<T>(i * n + j);
  }
  transpose<T>(rows);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) CHECK(rows[i][j] == j * n + i, "transpose at (%d, %d) is %g", i, j, double(rows[i][j]));
  }
}

template <class T>
void relu_keeps_nan() {
  Vec<T> v{};
  v[0] = static_cast<T>(NAN);
  v[1] = -2;
  const Vec<T> r = relu(v);
  CHECK(std::isnan(r[0]) && r[1] == 0, "relu(nan, -2) is %g, %g", double(r[0]), double(r[1]));
  CHECK(relu(broadcast<T>(5))[kLanes<T> - 1] == 5, "relu(5)");
  CHECK(max_vec(broadcast<T>(-1), broadcast<T>(2))[0] == 2 && max_vec(broadcast<T>(2), broadcast<T>(-1))[0] == 2, "max");
}

template <class T>
double ulps(double got, double want) {
  const T rounded = static_cast<T>(want);
  const double spacing = std::nextafter(std::fabs(rounded), std::numeric_limits<T>::infinity()) - std::fabs(rounded);
  return std::fabs(got - want) / spacing;
}

void exp_is_within_two_ulp() {
  for (int64_t i = 0; i < 2000000; i += kFloatLanes) {
    Vec<float> v;
    for (int lane = 0; lane < kFloatLanes; ++lane) v[lane] = static_cast<float>(-87.0 + 175.0 * static_cast<double>(i + lane) / 2e6);
    const Vec<float> e = exp(v);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const double want = std::exp(static_cast<double>(v[lane]));
      CHECK(ulps<float>(e[lane], want) <= 2, "exp(%a) = %a, want %a", v[lane], e[lane], want);
    }
  }
  const auto exp_of = [](float value) { return float(exp(broadcast(0.0f) + value)[0]); };
  for (const float masked : {-INFINITY, -1e30f, -104.0f, -87.5f, std::nextafterf(-87.0f, -INFINITY)}) {
    CHECK(bits_of(exp_of(masked)) == 0, "exp(%g) = %g, and must be exactly 0", masked, exp_of(masked));
  }
  CHECK(exp_of(0.0f) == 1.0f && exp_of(-0.0f) == 1.0f, "exp(0) = %a", exp_of(0.0f));
  CHECK(std::isnan(exp_of(NAN)), "exp(nan) = %g", exp_of(NAN));
  for (const float large : {89.0f, 1000.0f, INFINITY}) CHECK(std::isinf(exp_of(large)), "exp(%g) = %g", large, exp_of(large));
  Vec<double> d{};
  d[0] = -1.5;
  CHECK(exp(d)[0] == std::exp(-1.5) && exp(d)[1] == 1.0, "exp of doubles");
}

void sizes() {
  CHECK(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(16, 16) == 16 && round_up(17, 16) == 32, "round_up");
  CHECK(ceil_div(0, 3) == 0 && ceil_div(1, 3) == 1 && ceil_div(3, 3) == 1 && ceil_div(4, 3) == 2, "ceil_div");
}

}  // namespace
}  // namespace vitkernels::test

int main(int, char** argv) {
  using namespace vitkernels::test;
  if (!can_run(argv[1])) return kSkipped;
  sizes();
  loads_are_exact<vitkernels::BFloat16>();
  loads_are_exact<vitkernels::Float16>();
  stores_round_to_nearest_even<vitkernels::BFloat16>();
  stores_round_to_nearest_even<vitkernels::Float16>();
  partial_access_stays_in_bounds<float>();
  partial_access_stays_in_bounds<double>();
  partial_access_stays_in_bounds<vitkernels::BFloat16>();
  partial_access_stays_in_bounds<vitkernels::Float16>();
  reductions_and_transposes<float>();
  reductions_and_transposes<double>();
  relu_keeps_nan<float>();
  relu_keeps_nan<double>();
  exp_is_within_two_ulp();
  return finish();
}
