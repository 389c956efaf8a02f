// What the token family's kernels share: shares of the channels, and how many threads are worth starting.
#pragma once

#include <cstring>

#include "common/rows.h"
#include "common/tile.h"
#include "tokens/kernels.h"

namespace vitkernels {
namespace VITKERNELS_ISA {
namespace {

using namespace tokens;

constexpr int64_t kSerialElements = 1 << 15;  // below, a second thread costs more than it saves

inline int64_t workers(int64_t elements) { return elements < kSerialElements ? 1 : num_threads(); }

// Channels [first, first + count) of a row: whole vectors but for the row's last.
struct Channels {
  int64_t first, count;
};
template <class T>
inline Channels channels(int64_t dim, int64_t part, int64_t parts) {
  const Range vectors = share(ceil_div(dim, kLanes<T>), part, parts);
  const int64_t first = vectors.begin * kLanes<T>;
  return {first, min_of(vectors.end * kLanes<T>, dim) - first};
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
