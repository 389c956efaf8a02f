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
void check_product(int64_t rows, int64_t depth, int64_t vectors, bool transposed, bool in_parts = false) {
  const int64_t lanes = kLanes<T>, b_row = vectors * lanes + lanes;  // a panel wider than the product: the rest must not be read into it
  const std::vector<T> a = random_values<T>(rows * depth, 1), b = random_values<T>(depth * b_row, 2);
  const int64_t a_row = transposed ? 1 : depth, a_col = transposed ? rows : 1;
  std::vector<double> got(static_cast<size_t>(rows * vectors * lanes), NAN);
  std::vector<int> written(static_cast<size_t>(rows * vectors), 0);
  const auto epilogue = [&](int64_t row, int64_t vector, Vec<T> acc) {
    CHECK(row >= 0 && row < rows && vector >= 0 && vector < vectors, "epilogue at (%ld, %ld)", long(row), long(vector));
    ++written[row * vectors + vector];
    for (int64_t lane = 0; lane < lanes; ++lane) got[(row * vectors + vector) * lanes + lane] = acc[lane];
  };
  if (in_parts) {
    gemm_in_parts(rows, depth, vectors, a.data(), a_row, b.data(), b_row, epilogue);
  } else {
    gemm(rows, depth, vectors, a.data(), a_row, a_col, b.data(), b_row, epilogue);
  }
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

// From three rows on, a row's sums are the same bits whatever the number of rows: the tokens of a batch may be shared out in any way.
template <class T>
void check_same_whatever_rows(int64_t depth) {
  constexpr int64_t most = 2 * kStripRows + 5, vectors = 3;
  const int64_t columns = vectors * kLanes<T>;
  const std::vector<T> a = random_values<T>(most * depth, 5), b = random_values<T>(depth * columns, 6);
  const auto product = [&](int64_t first, int64_t rows) {
    std::vector<T> out(static_cast<size_t>(rows * columns));
    const auto keep = [&](int64_t row, int64_t v, Vec<T> acc) { store(out.data() + row * columns + v * kLanes<T>, acc); };
    gemm_in_parts(rows, depth, vectors, a.data() + first * depth, depth, b.data(), columns, keep);
    return out;
  };
  const std::vector<T> all = product(0, most);
  for (int64_t rows = 3; rows < most; ++rows) {
    const std::vector<T> some = product(most - rows, rows);
    CHECK(std::memcmp(some.data(), all.data() + (most - rows) * columns, some.size() * sizeof(T)) == 0, "the last %ld rows of %ld differ", long(rows), long(most));
  }
}

#if defined(__AVX512BF16__)
void check_product_bf16(int64_t rows, int64_t pairs, int64_t vectors, bool in_parts = false) {
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
  const auto epilogue = [&](int64_t row, int64_t vector, Vec<float> acc) {
    for (int64_t lane = 0; lane < lanes; ++lane) got[row * columns + vector * lanes + lane] = acc[lane];
  };
  if (in_parts) {
    gemm_in_parts(rows, pairs, vectors, a.data(), depth, b.data(), columns, epilogue);
  } else {
    gemm_bf16(rows, pairs, vectors, a.data(), depth, b.data(), columns, epilogue);
  }
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
  // One part and several, one strip of rows and several.
  for (const int64_t rows : {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{10}, kStripRows, kStripRows + 1, 2 * kStripRows + 3}) {
    for (const int64_t depth : {int64_t{7}, kChain, kChain + 1, 2 * kChain + 65}) {
      for (const int64_t vectors : {1, 2, 3}) {
        check_product<float>(rows, depth, vectors, false, true);
        check_product<double>(rows, depth, vectors, false, true);
#if defined(__AVX512BF16__)
        check_product_bf16(rows, depth, vectors, true);
#endif
      }
    }
  }
  check_same_whatever_rows<float>(2 * kChain + 3);
  check_same_whatever_rows<double>(kChain - 1);
  for (const bool in_parts : {false, true}) check_product<float>(3, 0, 2, false, in_parts);  // an empty sum is zero, and is written
}

}  // namespace
}  // namespace vitkernels::test

int main(int, char** argv) {
  if (!vitkernels::test::can_run(argv[1])) return vitkernels::test::kSkipped;
  vitkernels::test::run();
  return vitkernels::test::finish();
}
