// Panels of tokens: brought in from and back to tensors of every layout, element by element against the strides' own definition.
#include <cmath>
#include <numeric>
#include <vector>

#include "common/tile.h"
#include "per_isa.h"

namespace vitkernels {

// The tests need no PyTorch: its pool is one thread here.
int64_t num_threads() { return 1; }
void parallel_for(int64_t n, void (*body)(void* context, int64_t i), void* context) {
  for (int64_t i = 0; i < n; ++i) body(context, i);
}

namespace test {
namespace {

using namespace vitkernels::VITKERNELS_ISA;

// Small integers: exact in every storage type.
template <class S>
S element(int64_t i) {
  S value;
  store_scalar(&value, static_cast<Arith<S>>(i % 251 - 125));
  return value;
}

template <class S>
Tokens<S> tokens(S* data, int64_t dim, int64_t height, int64_t width, int layout) {
  switch (layout) {
    case 0:  // NCHW
      return {data, dim, height, width, height * width, width, 1};
    case 1:  // channels_last
      return {data, dim, height, width, 1, width * dim, dim};
    case 2:  // NCHW, height and width exchanged
      return {data, dim, height, width, height * width, 1, height};
    default:  // every second pixel of a larger NCHW image
      return {data, dim, height, width, 4 * height * width, 4 * width, 2};
  }
}

template <class S>
void check_panels(int64_t dim, int64_t height, int64_t width, int layout) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const S untouched = element<S>(124);
  const int64_t total = height * width, size = dim * total * (layout == 3 ? 4 : 1);
  std::vector<S> data(static_cast<size_t>(size)), copy(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) data[i] = element<S>(i * 7 + 3);
  const Tokens<S> x = tokens(data.data(), dim, height, width, layout), y = tokens(copy.data(), dim, height, width, layout);
  for (const int64_t columns : {lanes, 2 * lanes, 3 * lanes}) {
    for (const int64_t first : {int64_t{0}, total / 3}) {
      for (const int64_t count : {int64_t{1}, lanes, lanes + 1, total - first}) {
        if (first + count > total) continue;
        const int64_t padded = round_up(count, columns);
        std::vector<T> panels(static_cast<size_t>(dim * padded), T(NAN));
        load_panels(x, first, count, panels.data(), columns);
        copy.assign(copy.size(), untouched);
        store_panels(y, first, count, panels.data(), columns);
        for (int64_t c = 0; c < dim; ++c) {
          for (int64_t t = 0; t < padded; ++t) {
            const int64_t h = (first + t) / width, w = (first + t) % width;
            const int64_t at = c * x.dim_stride + h * x.height_stride + w * x.width_stride;
            const T want = t < count ? to_float(data[at]) : T(0);
            const T got = panels[t / columns * dim * columns + c * columns + t % columns];
            CHECK(got == want, "layout %d, %ldx%ldx%ld, token %ld + %ld of channel %ld is %g, want %g", layout, long(dim), long(height), long(width),
                  long(first), long(t), long(c), double(got), double(want));
            if (t < count) {
              CHECK(to_float(copy[at]) == want, "layout %d, token %ld of channel %ld came back as %g, want %g", layout, long(first + t), long(c),
                    double(to_float(copy[at])), double(want));
              copy[at] = untouched;
            }
          }
        }
        for (int64_t i = 0; i < size; ++i) CHECK(to_float(copy[i]) == to_float(untouched), "layout %d, element %ld was overwritten", layout, long(i));
      }
    }
  }
}

template <class S>
void check_all_panels() {
  for (int layout = 0; layout < 4; ++layout) {
    for (const int64_t dim : {1, 3, 8, 16, 17, 37}) {
      for (const int64_t height : {1, 2, 5, 16}) {
        for (const int64_t width : {1, 3, 7, 16, 20}) check_panels<S>(dim, height, width, layout);
      }
    }
  }
}

template <class T>
void check_transpose_panel() {
  for (const int64_t rows : {1, 2, 7, 16, 19, 40}) {
    for (const int64_t vectors : {1, 2, 3}) {
      const int64_t columns = vectors * kLanes<T>, stride = round_up(rows, kLanes<T>);
      std::vector<T> panel(static_cast<size_t>(rows * columns)), out(static_cast<size_t>(columns * stride), T(NAN));
      std::iota(panel.begin(), panel.end(), T(1));
      transpose_panel(panel.data(), rows, columns, out.data(), stride);
      for (int64_t t = 0; t < columns; ++t) {
        for (int64_t c = 0; c < stride; ++c) {
          const T want = c < rows ? panel[c * columns + t] : T(0);
          CHECK(out[t * stride + c] == want, "%ldx%ld at (%ld, %ld): %g", long(rows), long(columns), long(t), long(c), double(out[t * stride + c]));
        }
      }
    }
  }
}

template <class S>
void check_weight() {
  for (const int64_t count : {1, 15, 16, 17, 16384, 16385, 40000}) {
    std::vector<S> values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) values[i] = element<S>(i * 13);
    const Weight<S> weight(values.data(), count), absent(nullptr, count);
    const Arith<S>*const got = weight, *const zeros = absent;
    for (int64_t i = 0; i < count; ++i) {
      CHECK(got[i] == to_float(values[i]), "element %ld of %ld is %g", long(i), long(count), double(got[i]));
      CHECK(zeros[i] == 0, "element %ld of an absent weight is %g", long(i), double(zeros[i]));
    }
  }
}

void check_share() {
  for (const int64_t n : {0, 1, 5, 100, 101}) {
    for (const int64_t parts : {1, 2, 3, 7, 200}) {
      int64_t next = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const Range range = share(n, part, parts);
        CHECK(range.begin == next && range.end >= range.begin, "share %ld of %ld of %ld", long(part), long(parts), long(n));
        next = range.end;
      }
      CHECK(next == n, "%ld in %ld parts ends at %ld", long(n), long(parts), long(next));
    }
  }
}

template <class S>
void run() {
  check_all_panels<S>();
  check_weight<S>();
}

}  // namespace
}  // namespace test
}  // namespace vitkernels

int main(int, char** argv) {
  using namespace vitkernels::test;
  if (!can_run(argv[1])) return kSkipped;
  run<float>();
  run<double>();
  run<vitkernels::BFloat16>();
  run<vitkernels::Float16>();
  check_transpose_panel<float>();
  check_transpose_panel<double>();
  check_share();
  return finish();
}
