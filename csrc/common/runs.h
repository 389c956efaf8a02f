// Runs of equally spaced tokens, brought from a strided tensor into token-major rows of the arithmetic type, [tokens][channels padded to whole vectors], and
// back. Where a tile of common/tile.h has a channel's tokens along the lanes, these have a token's channels.
#pragma once

#include "common/simd.h"

namespace vitkernels {
namespace VITKERNELS_ISA {

// Channels in groups (heads), each padded to whole vectors; `total` is the distance between tokens.
struct Channels {
  int64_t groups, size, row, total;
};

template <class S>
inline void load_run(const S* base, int64_t dim_stride, int64_t token_stride, int64_t count, const Channels& c, Arith<S>* out) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t out_row = c.total;
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int64_t j = 0; j < c.row; j += lanes) {
      const S* source = base + (g * c.size + j) * dim_stride;
      T* target = out + g * c.row + j;
      const int64_t channels = min_of(c.size - j, lanes);
      if (token_stride == 1) {
        for (int64_t t = 0; t < count; t += lanes) {
          const int64_t n = min_of(count - t, lanes);
          Vec<T> block[lanes] = {};
          for (int64_t i = 0; i < channels; ++i) block[i] = n == lanes ? load(source + i * dim_stride + t) : load_partial(source + i * dim_stride + t, n);
          transpose<T>(block);
          for (int64_t i = 0; i < n; ++i) store(target + (t + i) * out_row, block[i]);
        }
      } else if (dim_stride == 1) {
        for (int64_t t = 0; t < count; ++t) {
          const S* token = source + t * token_stride;
          store(target + t * out_row, channels == lanes ? load(token) : load_partial(token, channels));
        }
      } else {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t i = 0; i < lanes; ++i) target[t * out_row + i] = i < channels ? to_float(source[i * dim_stride + t * token_stride]) : T(0);
        }
      }
    }
  }
}

// With `add` the rows are added to what is there.
template <class S>
inline void store_run(S* base, int64_t dim_stride, int64_t token_stride, int64_t count, const Channels& c, const Arith<S>* in, bool add = false) {
  using T = Arith<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t in_row = c.total;
  const auto put = [add](S* target, Vec<T> v, int64_t n) {
    if (n == lanes) {
      store(target, add ? v + load(target) : v);
    } else {
      store_partial(target, add ? v + load_partial(target, n) : v, n);
    }
  };
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int64_t j = 0; j < c.row; j += lanes) {
      S* target = base + (g * c.size + j) * dim_stride;
      const T* source = in + g * c.row + j;
      const int64_t channels = min_of(c.size - j, lanes);
      if (token_stride == 1) {
        for (int64_t t = 0; t < count; t += lanes) {
          const int64_t n = min_of(count - t, lanes);
          Vec<T> block[lanes] = {};
          for (int64_t i = 0; i < n; ++i) block[i] = load(source + (t + i) * in_row);
          transpose<T>(block);
          for (int64_t i = 0; i < channels; ++i) put(target + i * dim_stride + t, block[i], n);
        }
      } else if (dim_stride == 1) {
        for (int64_t t = 0; t < count; ++t) put(target + t * token_stride, load(source + t * in_row), channels);
      } else {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t i = 0; i < channels; ++i) {
            S* place = target + i * dim_stride + t * token_stride;
            store_scalar(place, add ? source[t * in_row + i] + to_float(*place) : source[t * in_row + i]);
          }
        }
      }
    }
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
