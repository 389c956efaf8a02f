// The tile product against plain double loops, over sizes that leave every kind of remainder.
#include <cmath>
#include <vector>

#include "common/gemm.h"
#include "per_isa.h"

namespace vitkernels::test {
namespace {

using namespace vitkernels::VITKERNELS_ISA;

constexpr int64_t kSizes[] = {1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 31, 48, 65};

template <class T>
std::vector<T> random_values(int64_t count, unsigned long long seed) {
  Random random(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(random.next());
  return values;
}

// Any summation order of n products errs by at most n * eps * sum |a b| (Higham, Accuracy and Stability, eq. 3.5).
template <class T>
void check_product(int64_t rows, int64_t depth, int64_t vectors, bool transposed) {
  const int64_t lanes = kLanes<T>, b_row = vectors * lanes + lanes;  // a panel wider than the product: the rest must not be read into it
  const std::vector<T> a = random_values<T>(rows * depth, 1), b = random_values<T>(depth * b_row, 2);
  const int64_t a_row = transposed ? 1 : depth, a_col = transposed ? rows : 1;
  std::vector<double> got(static_cast<size_t>(rows * vectors * lanes), NAN);
  std::vector<int> written(static_cast<size_t>(rows * vectors), 0);
  gemm(rows, depth, vectors, a.data(), a_row, a_col, b.data(), b_row, [&](int64_t row, int64_t vector, Vec<T> acc) {
    CHECK(row >= 0 && row < rows && vector >= 0 && vector < vectors, "epilogue at (%ld, %ld)", long(row), long(vector));
    ++written[row * vectors + vector];
    for (int64_t lane = 0; lane < lanes; ++lane) got[(row * vectors + vector) * lanes + lane] = acc[lane];
  });
  for (const int count : written) CHECK(count == 1, "the epilogue ran %d times for one tile", count);
  const double eps = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < vectors * lanes; ++column) {
      long double want = 0, magnitude = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const long double product = static_cast<long double>(a[row * a_row + k * a_col]) * b[k * b_row + column];
        want += product;
        magnitude += product < 0 ? -product : product;
      }
      const double error = std::fabs(static_cast<double>(got[row * vectors * lanes + column] - want));
      CHECK(error <= static_cast<double>(depth * eps * magnitude), "%ldx%ldx%ld at (%ld, %ld): error %g", long(rows), long(depth),
            long(vectors * lanes), long(row), long(column), error);
    }
  }
}

#if defined(__AVX512BF16__)
void check_product_bf16(int64_t rows, int64_t pairs, int64_t vectors) {
  const int64_t lanes = kFloatLanes, depth = 2 * pairs, columns = vectors * lanes;
  const std::vector<float> a_values = random_values<float>(rows * depth, 3), b_values = random_values<float>(depth * columns, 4);
  std::vector<BFloat16> a(a_values.size());
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<BFloat16>(a_values[i]);
  std::vector<uint32_t> b(static_cast<size_t>(pairs * columns));
  for (int64_t k = 0; k < pairs; ++k) {
    for (int64_t n = 0; n < columns; ++n) {
      const uint32_t low = from_float<BFloat16>(b_values[2 * k * columns + n]).bits;
      const uint32_t high = from_float<BFloat16>(b_values[(2 * k + 1) * columns + n]).bits;
      b[k * columns + n] = low | high << 16;
    }
  }
  std::vector<float> got(static_cast<size_t>(rows * columns), NAN);
  gemm_bf16(rows, pairs, vectors, a.data(), depth, b.data(), columns, [&](int64_t row, int64_t vector, Vec<float> acc) {
    for (int64_t lane = 0; lane < lanes; ++lane) got[row * columns + vector * lanes + lane] = acc[lane];
  });
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < columns; ++n) {
      double want = 0, magnitude = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const uint16_t bits = static_cast<uint16_t>(b[k / 2 * columns + n] >> (k % 2 * 16));
        const double product = static_cast<double>(to_float(a[row * depth + k])) * to_float(BFloat16{bits});
        want += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(got[row * columns + n] - want);
      // Products of bf16 are exact in fp32; vdpbf16ps flushes denormals, which adds at most the smallest normal number a step.
      CHECK(error <= depth * (0x1p-24 * magnitude + 0x1p-126), "%ldx%ldx%ld at (%ld, %ld): error %g", long(rows), long(depth), long(columns),
            long(row), long(n), error);
    }
  }
}
#endif

void run() {
  for (const int64_t rows : kSizes) {
    for (const int64_t depth : kSizes) {
      for (const int64_t vectors : {1, 2, 3, 4, 5}) {
        for (const bool transposed : {false, true}) {
          check_product<float>(rows, depth, vectors, transposed);
          check_product<double>(rows, depth, vectors, transposed);
        }
#if defined(__AVX512BF16__)
        check_product_bf16(rows, depth, vectors);
#endif
      }
    }
  }
  check_product<float>(3, 0, 2, false);  // an empty sum is zero, and is written
}

}  // namespace
}  // namespace vitkernels::test

int main(int, char** argv) {
  if (!vitkernels::test::can_run(argv[1])) return vitkernels::test::kSkipped;
  vitkernels::test::run();
  return vitkernels::test::finish();
}
