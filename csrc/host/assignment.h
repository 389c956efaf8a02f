// Linear sum assignment on plain arrays: no Python, no torch. vitkernels/ops/matching/assignment.py holds the same rules in Python.
#pragma once

#include <cstdint>

namespace vitkernels::host {

// A matrix of costs under any strides (in elements).
template <class T>
struct Costs {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;
};

// min(rows, columns) matched pairs of least total cost, by ascending row; the pairs that scipy.optimize.linear_sum_assignment finds, also where several
// assignments cost the same. A NaN or an infinity counts as the largest finite cost, 0 if there is none; true if there was one.
template <class T>
bool assign(const Costs<T>& costs, int64_t* row, int64_t* column);

// layers x images problems: costs is [layers][targets][queries], image b has the targets from offsets[b] to offsets[b + 1]. Writes to
// matches[layer][image][query] the target, counted over all images, or -1, and to replaced[layer][image]
// what assign returns. On up to `threads` threads.
template <class T>
void assign_all(const T* costs, int64_t layers, int64_t queries, const int64_t* offsets, int64_t images, int64_t threads, int64_t* matches,
                bool* replaced);

}  // namespace vitkernels::host
