// Re-Attention's CUDA kernels' own code run on the CPU: lanes and warps in loops, tensor cores and shared memory emulated (csrc/common/warp.h).
//
// Results are held to the contract's rule: the error against float64 is at most twice that of the same mathematics done step by step in the element
// type, plus two units in the last place of the largest value. Shared memory and results start as NaN, and a phase must give the same bits in
// whatever order its warps run, which a missing barrier would not.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "head_mixing/cuda_forward.h"

namespace vitkernels::test {
namespace {

using namespace vitkernels::head_mixing::cuda;

struct Case {
  int batch, heads, tokens, dim, value_dim;
  Norm norm;
  bool vectors = true;   // bias of the mix, weight and bias of the norm
  double logits = 1.5;   // their size
};

int whole(int columns) { return (columns + 7) / 8 * 8; }

// Everything as doubles, of q, k and v exact in T; rows padded to whole 16 bytes, in memory [B, N, H, columns].
template <class T>
struct Values {
  std::vector<T> q, k, v;
  std::vector<double> mix, bias, weight, norm_bias, mean, var;

  explicit Values(const Case& c) {
    Random random(static_cast<unsigned long long>(c.heads * 1000 + c.tokens * 10 + c.dim));
    const auto draw = [&](int columns, double scale) {
      std::vector<T> x(static_cast<size_t>(c.batch) * c.tokens * c.heads * whole(columns), T{0});
      for (size_t i = 0; i < x.size(); ++i) {
        if (static_cast<int>(i % whole(columns)) < columns) x[i] = from_float<T>(static_cast<float>(scale * random.next()));
      }
      return x;
    };
    q = draw(c.dim, c.logits), k = draw(c.dim, c.logits), v = draw(c.value_dim, 1);
    const auto small = [&](int count, double base, double spread) {
      std::vector<double> x(static_cast<size_t>(count));
      for (double& value : x) value = base + spread * random.next();
      return x;
    };
    mix = small(c.heads * c.heads, 0, 1);
    const int some = c.vectors ? c.heads : 0;
    bias = small(some, 0, 0.1);
    if (c.norm != Norm::kNone) weight = small(some, 1, 0.5), norm_bias = small(some, 0, 0.5);
    if (c.norm == Norm::kBatch) mean = small(c.heads, 0, 0.5 / c.tokens), var = small(c.heads, 1e-4, 5e-5);
  }
};

template <class T>
double value_of(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return to_float(from_float<T>(static_cast<float>(x)));
}

// The definition, each step rounded to R; element T.
template <class R, class T>
std::vector<double> defined(const Case& c, const Values<T>& x) {
  const auto at = [&](const std::vector<T>& rows, int columns, int b, int h, int i, int d) {
    return static_cast<double>(to_float(rows[((static_cast<size_t>(b) * c.tokens + i) * c.heads + h) * whole(columns) + d]));
  };
  const auto small = [&](const std::vector<double>& values, int i, double otherwise) {
    return values.empty() ? otherwise : value_of<R>(values[static_cast<size_t>(i)]);
  };
  const double scale = 1 / std::sqrt(c.dim);
  std::vector<double> out(static_cast<size_t>(c.batch) * c.tokens * c.heads * c.value_dim);
  std::vector<double> p(static_cast<size_t>(c.heads) * c.tokens), z(p.size());
  for (int b = 0; b < c.batch; ++b) {
    for (int i = 0; i < c.tokens; ++i) {
      for (int h = 0; h < c.heads; ++h) {
        double top = -INFINITY, sum = 0;
        for (int j = 0; j < c.tokens; ++j) {
          double s = 0;
          for (int d = 0; d < c.dim; ++d) s += at(x.q, c.dim, b, h, i, d) * at(x.k, c.dim, b, h, j, d);
          p[h * c.tokens + j] = value_of<R>(value_of<R>(s) * scale), top = std::fmax(top, p[h * c.tokens + j]);
        }
        for (int j = 0; j < c.tokens; ++j) sum += p[h * c.tokens + j] = std::exp(p[h * c.tokens + j] - top);
        for (int j = 0; j < c.tokens; ++j) p[h * c.tokens + j] = value_of<R>(p[h * c.tokens + j] / sum);
      }
      for (int j = 0; j < c.tokens; ++j) {
        double mean = 0, square = 0;
        for (int g = 0; g < c.heads; ++g) {
          double m = small(x.bias, g, 0);
          for (int h = 0; h < c.heads; ++h) m += value_of<R>(x.mix[g * c.heads + h]) * p[h * c.tokens + j];
          z[g * c.tokens + j] = value_of<R>(m), mean += z[g * c.tokens + j] / c.heads;
        }
        for (int g = 0; g < c.heads; ++g) square += (z[g * c.tokens + j] - mean) * (z[g * c.tokens + j] - mean) / c.heads;
        for (int g = 0; g < c.heads; ++g) {
          double& m = z[g * c.tokens + j];
          if (c.norm == Norm::kLayer) m = (m - mean) / std::sqrt(square + 1e-5) * small(x.weight, g, 1) + small(x.norm_bias, g, 0);
          if (c.norm == Norm::kBatch) m = (m - x.mean[g]) / std::sqrt(x.var[g] + 1e-5) * small(x.weight, g, 1) + small(x.norm_bias, g, 0);
          m = value_of<R>(m);
        }
      }
      for (int g = 0; g < c.heads; ++g) {
        for (int d = 0; d < c.value_dim; ++d) {
          double sum = 0;
          for (int j = 0; j < c.tokens; ++j) sum += z[g * c.tokens + j] * at(x.v, c.value_dim, b, g, j, d);
          out[((static_cast<size_t>(b) * c.tokens + i) * c.heads + g) * c.value_dim + d] = value_of<R>(sum);
        }
      }
    }
  }
  return out;
}

template <int kWarps>
std::vector<int> order_of(int which) {
  std::vector<int> order;
  for (int i = 0; i < kWarps; ++i) order.push_back(which == 0 ? i : which == 1 ? kWarps - 1 - i : (i * 3 + 1) % kWarps);
  return order;
}

// The kernels on the CPU. Without `lse` it is what comes out.
template <class T, class P, int kSteps>
std::vector<double> emulated(const Case& c, const Values<T>& x, int which, std::vector<double>& lse) {
  const auto rows = [&](const std::vector<T>& data, int columns) {
    const int64_t row = static_cast<int64_t>(c.heads) * whole(columns);
    return Rows{data.data(), c.tokens * row, whole(columns), row, whole(columns)};
  };
  std::vector<T> out(static_cast<size_t>(c.batch) * c.tokens * c.heads * c.value_dim, from_float<T>(NAN));
  lse.assign(static_cast<size_t>(c.batch) * c.heads * c.tokens, NAN);
  const auto pointer = [](const std::vector<double>& values) { return values.empty() ? nullptr : values.data(); };
  Arguments a{};
  a.q = rows(x.q, c.dim), a.k = rows(x.k, c.dim), a.v = rows(x.v, c.value_dim);
  a.batch = c.batch, a.heads = c.heads, a.tokens = c.tokens, a.value_dim = c.value_dim;
  a.scale_log2 = static_cast<float>(kLog2E / std::sqrt(c.dim));
  a.lse = lse.data(), a.out = out.data();
  a.small = {pointer(x.mix), pointer(x.bias), pointer(x.weight), pointer(x.norm_bias), pointer(x.mean), pointer(x.var), c.norm, 1e-5};
  const auto run = [&](int64_t blocks, int shared, auto block) {
    // 16 bytes beyond its end: one over is found as a change.
    std::vector<char> memory(static_cast<size_t>(shared) + 32);
    char* begin = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    for (int64_t i = 0; i < blocks; ++i) {
      std::memset(begin, 0xff, static_cast<size_t>(shared) + 16);
      block(begin, i);
      for (int j = 0; j < 16; ++j) CHECK(begin[shared + j] == '\xff', "a block wrote beyond its shared memory");
    }
  };
  Folded folded;
  a.folded = &folded;
  const auto pieces = [](int n, int size) { return (n + size - 1) / size; };
  const std::vector<int> lse_order = order_of<kLseWarps>(which), order = order_of<P::kWarps>(which);
  run(static_cast<int64_t>(c.batch) * c.heads * pieces(c.tokens, kLseQueries), kLseShared<kSteps>,
      [&](char* shared, int64_t i) { lse_block<T, kSteps>({shared, i, lse_order.data()}, a); });
  run(1, kLseShared<kSteps>, [&](char* shared, int64_t) { fold_block({shared, 0, lse_order.data()}, a); });
  run(static_cast<int64_t>(c.batch) * pieces(c.tokens, P::kQueries) * pieces(c.value_dim, P::kColumns), P::kShared,
      [&](char* shared, int64_t i) { rows_block<T, P>({shared, i, order.data()}, a); });
  std::vector<double> result;
  for (const T value : out) result.push_back(to_float(value));
  return result;
}

template <class T, class P>
void check(const Case& c, const char* dtype) {
  const Values<T> x(c);
  const std::vector<double> exact = defined<double>(c, x), eager = defined<T>(c, x);
  std::vector<double> lse, other;
  const std::vector<double> ours = emulated<T, P, P::kSteps>(c, x, 0, lse);
  double largest = 0, error = 0, of_eager = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    largest = std::fmax(largest, std::fabs(exact[i]));
    of_eager = std::fmax(of_eager, std::fabs(eager[i] - exact[i]));
    error = std::isnan(ours[i]) ? INFINITY : std::fmax(error, std::fabs(ours[i] - exact[i]));
  }
  const double unit = std::is_same_v<T, BFloat16> ? 0x1p-7 : 0x1p-10;
  CHECK(
      error <= 2 * of_eager + 2 * unit * largest, "%s, norm %d, B%d H%d N%d d%d/%d, %d rows: error %.3g, eager's %.3g, largest value %.3g", dtype,
      static_cast<int>(c.norm), c.batch, c.heads, c.tokens, c.dim, c.value_dim, P::kQueries, error, of_eager, largest);
  for (const double value : lse) CHECK(std::isfinite(value), "%s: a logsumexp is %g", dtype, value);
  for (const int which : {1, 2}) {
    const std::vector<double> again = emulated<T, P, P::kSteps>(c, x, which, other);
    CHECK(std::memcmp(again.data(), ours.data(), ours.size() * sizeof(double)) == 0 && lse == other, "%s: another order of the warps, other bits", dtype);
  }
}

template <int kHeads, int kSteps>
void check_all(const Case& c) {
  if (kHeads == 12) check<BFloat16, Plan<kHeads, kSteps, 4>>(c, "bfloat16");
  check<BFloat16, Plan<kHeads, kSteps, 2>>(c, "bfloat16");
  check<BFloat16, Plan<kHeads, kSteps, 1>>(c, "bfloat16");
  check<Float16, Plan<kHeads, kSteps, 2>>(c, "float16");
}

void run() {
  for (const Norm norm : {Norm::kNone, Norm::kBatch, Norm::kLayer}) {
    check_all<12, 2>({1, 12, 37, 32, 32, norm});
    check_all<8, 2>({2, 3, 21, 24, 20, norm, false});
    check_all<16, 4>({1, 16, 35, 64, 64, norm});
  }
  // More than one tile of queries for the logsumexp, of keys for both; a map that is nearly flat, a peaked one.
  check_all<12, 2>({1, 9, 101, 32, 32, Norm::kLayer});
  check_all<8, 2>({1, 4, 70, 16, 16, Norm::kLayer, true, 0.05});
  check_all<8, 2>({1, 8, 50, 32, 32, Norm::kLayer, true, 8});
  // Odd dims, values wider than a block's columns, one head, one token.
  check_all<8, 4>({1, 5, 40, 35, 33, Norm::kBatch});
  check_all<8, 4>({1, 2, 33, 8, 72, Norm::kLayer});
  check_all<8, 2>({1, 1, 9, 5, 7, Norm::kNone});
  check_all<16, 2>({2, 13, 1, 32, 32, Norm::kLayer});
  // The plan that was fastest on an H200 is said to be: 12 heads of 32, 64 x 197 tokens 99 us with 64 queries (109, 106 with 32, 16), 16 x 577 tokens
  // 196 us with 32 or 16 (232 with 64); 12 heads of 64, 64 x 197 tokens 150 us with 32 (192 with 16).
  const auto time = [](auto plan, int batch, int tokens) {
    using P = decltype(plan);
    return time_of<P>(int64_t{batch} * ((tokens + P::kQueries - 1) / P::kQueries), 132, 227 * 1024);
  };
  CHECK((time(Plan<12, 2, 4>{}, 64, 197) < time(Plan<12, 2, 2>{}, 64, 197)), "64 queries");
  CHECK((time(Plan<12, 2, 2>{}, 16, 577) <= time(Plan<12, 2, 1>{}, 16, 577) && time(Plan<12, 2, 2>{}, 16, 577) < time(Plan<12, 2, 4>{}, 16, 577)), "32");
  CHECK((time(Plan<12, 4, 2>{}, 64, 197) < time(Plan<12, 4, 1>{}, 64, 197)), "32 queries of 64 columns");
  CHECK((time(Plan<12, 2, 1>{}, 1, 197) <= time(Plan<12, 2, 4>{}, 1, 197)), "one image");
  CHECK((time_of<Plan<16, 4, 2>>(1, 132, 227 * 1024) == kNever), "a plan that does not fit");
  // What fits: shared memory of an A100 and of an H100.
  CHECK((Plan<12, 4, 1>::kShared <= 163 * 1024 && Plan<16, 2, 1>::kShared <= 163 * 1024), "16 queries do not fit an A100");
  CHECK((Plan<16, 4, 1>::kShared <= 227 * 1024 && Plan<12, 4, 2>::kShared <= 227 * 1024 && Plan<12, 2, 4>::kShared <= 227 * 1024), "not an H100");
}

}  // namespace
}  // namespace vitkernels::test

int main() {
  vitkernels::test::run();
  return vitkernels::test::finish();
}
