// Shortest augmenting paths (D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016).
//
// Which of several cheapest assignments is found depends on three things, which are therefore scipy's: the sums are rounded in its order and in double, the
// columns that are left are looked at in its order, and of equally near columns the last free one is taken, the first where none is free.
#include "host/assignment.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

namespace vitkernels::host {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kWorkOfAThread = 1 << 17;  // costs looked at while a thread starts, several times over

class Solver {
 public:
  // column_of()[i] is the column of row i of a problem that has no more rows than columns.
  template <class T>
  bool solve(const Costs<T>& costs) {
    rows_ = costs.rows, columns_ = costs.columns;
    if (rows_ == 0) return false;
    make_room();
    const bool replaced = load(costs);
    for (int64_t row = 0; row < rows_; ++row) {
      if (!take_nearest(row)) exchange(row);
    }
    return replaced;
  }

  const int64_t* column_of() const { return column_of_; }

 private:
  // Two blocks of memory for all there is: of a small problem the allocations would take longer than the rest.
  void make_room() {
    numbers_.resize(rows_ * columns_ + rows_ + 2 * columns_);
    indices_.resize(2 * rows_ + 4 * columns_);
    costs_ = numbers_.data(), u_ = costs_ + rows_ * columns_, v_ = u_ + rows_, length_ = v_ + columns_;
    column_of_ = indices_.data(), row_of_ = column_of_ + rows_, reached_rows_ = row_of_ + columns_;
    reached_columns_ = reached_rows_ + rows_, came_from_ = reached_columns_ + columns_, left_ = came_from_ + columns_;
    std::fill(u_, length_, 0.0);
    std::fill(column_of_, reached_rows_, int64_t{-1});
  }

  // The costs in double, finite; true if some were not.
  template <class T>
  bool load(const Costs<T>& costs) {
    bool finite = true;
    for (int64_t i = 0; i < rows_; ++i) {
      const T* from = costs.data + i * costs.row_stride;
      double* to = costs_ + i * columns_;
      for (int64_t j = 0; j < columns_; ++j) {
        to[j] = static_cast<double>(from[j * costs.column_stride]);
        finite &= std::fabs(to[j]) < kInfinity;
      }
    }
    if (finite) return false;
    double largest = -kInfinity;
    for (const double* cost = costs_; cost != u_; ++cost) {
      if (std::isfinite(*cost)) largest = std::max(largest, *cost);
    }
    if (largest == -kInfinity) largest = 0;
    for (double* cost = costs_; cost != u_; ++cost) {
      if (!std::isfinite(*cost)) *cost = largest;
    }
    return true;
  }

  // The first step of exchange(): if the column nearest to a row is free it is the row's, and nothing needs to be remembered. False if it is not.
  bool take_nearest(int64_t row) {
    const double *cost = costs_ + row * columns_, *price = v_;
    double lows[4] = {kInfinity, kInfinity, kInfinity, kInfinity};  // four chains of comparisons, which do not wait for each other
    int64_t j = 0;
    for (; j + 4 <= columns_; j += 4) {
      for (int k = 0; k < 4; ++k) lows[k] = std::min(lows[k], cost[j + k] - price[j + k]);
    }
    for (; j < columns_; ++j) lows[0] = std::min(lows[0], cost[j] - price[j]);
    const double lowest = std::min(std::min(lows[0], lows[1]), std::min(lows[2], lows[3]));
    int64_t nearest = -1;
    for (j = columns_ - 1; j >= 0; --j) {
      if (cost[j] - price[j] == lowest && (nearest < 0 || row_of_[j] < 0)) nearest = j;
    }
    if (row_of_[nearest] >= 0) return false;
    u_[row] = lowest;
    row_of_[nearest] = row, column_of_[row] = nearest;
    return true;
  }

  // Gives `current` a column by the cheapest path of exchanges among the rows that have theirs. There is one: a free column, whose price v is 0, is at a finite
  // distance from `current`, whose u is 0, even where other sums overflow.
  void exchange(int64_t current) {
    std::fill(length_, length_ + columns_, kInfinity);
    int64_t left = columns_, rows = 0, columns = 0, row = current, sink = -1;
    for (int64_t k = 0; k < left; ++k) left_[k] = left - 1 - k;
    double lowest = 0;
    while (sink < 0) {
      reached_rows_[rows++] = row;
      const double* cost = costs_ + row * columns_;
      const double base = lowest, row_price = u_[row];
      int64_t nearest = 0;
      lowest = kInfinity;
      for (int64_t k = 0; k < left; ++k) {
        const int64_t j = left_[k];
        const double through = base + cost[j] - row_price - v_[j];
        if (through < length_[j]) length_[j] = through, came_from_[j] = row;
        if (length_[j] < lowest || (length_[j] == lowest && row_of_[j] < 0)) lowest = length_[j], nearest = k;
      }
      const int64_t column = left_[nearest];
      reached_columns_[columns++] = column;
      left_[nearest] = left_[--left];
      if (row_of_[column] < 0) {
        sink = column;
      } else {
        row = row_of_[column];
      }
    }
    u_[current] += lowest;
    for (int64_t k = 1; k < rows; ++k) u_[reached_rows_[k]] += lowest - length_[column_of_[reached_rows_[k]]];
    for (int64_t k = 0; k < columns; ++k) v_[reached_columns_[k]] -= lowest - length_[reached_columns_[k]];
    for (row = -1; row != current;) {
      row = row_of_[sink] = came_from_[sink];
      std::swap(column_of_[row], sink);
    }
  }

  int64_t rows_ = 0, columns_ = 0;
  std::vector<double> numbers_;
  std::vector<int64_t> indices_;
  double *costs_ = nullptr, *u_ = nullptr, *v_ = nullptr, *length_ = nullptr;
  int64_t *row_of_ = nullptr, *column_of_ = nullptr, *came_from_ = nullptr, *left_ = nullptr, *reached_rows_ = nullptr, *reached_columns_ = nullptr;
};

template <class T>
Costs<T> transposed(const Costs<T>& c) { return {c.data, c.columns, c.rows, c.column_stride, c.row_stride}; }

// body(i, solver) for i in [0, count), on `threads` threads, this one among them; each takes the next problem as soon as it is done with one.
template <class Body>
void for_each(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Solver solver;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, solver);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

template <class T>
bool assign(const Costs<T>& costs, int64_t* row, int64_t* column) {
  Solver solver;
  const bool tall = costs.rows > costs.columns;
  const bool replaced = solver.solve(tall ? transposed(costs) : costs);
  const int64_t* partner = solver.column_of();
  if (!tall) {
    std::iota(row, row + costs.rows, int64_t{0});
    std::copy(partner, partner + costs.rows, column);
    return replaced;
  }
  std::iota(column, column + costs.columns, int64_t{0});
  std::sort(column, column + costs.columns, [&](int64_t a, int64_t b) { return partner[a] < partner[b]; });
  for (int64_t k = 0; k < costs.columns; ++k) row[k] = partner[column[k]];
  return replaced;
}

template <class T>
void assign_all(const T* costs, int64_t layers, int64_t queries, const int64_t* offsets, int64_t images, int64_t threads, int64_t* matches,
                bool* replaced) {
  int64_t work = 0;
  for (int64_t b = 0; b < images; ++b) {
    const int64_t targets = offsets[b + 1] - offsets[b];
    work += layers * targets * queries * std::max<int64_t>(1, std::min(targets, queries) / 8);
  }
  std::fill(matches, matches + layers * images * queries, int64_t{-1});
  for_each(layers * images, std::min(threads, 1 + work / kWorkOfAThread), [&](int64_t i, Solver& solver) {
    const int64_t layer = i / images, image = i % images, first = offsets[image], targets = offsets[image + 1] - first;
    // scipy is given [queries, targets] and transposes it where that is tall: then the rows are the targets, else the queries.
    const Costs<T> of_targets = {costs + (layer * offsets[images] + first) * queries, targets, queries, queries, 1};
    const bool by_target = targets < queries;
    replaced[i] = solver.solve(by_target ? of_targets : transposed(of_targets));
    int64_t* match = matches + i * queries;
    const int64_t* partner = solver.column_of();
    for (int64_t k = 0; k < std::min(targets, queries); ++k) by_target ? match[partner[k]] = first + k : match[k] = first + partner[k];
  });
}

template bool assign<float>(const Costs<float>&, int64_t*, int64_t*);
template bool assign<double>(const Costs<double>&, int64_t*, int64_t*);
template void assign_all<float>(const float*, int64_t, int64_t, const int64_t*, int64_t, int64_t, int64_t*, bool*);
template void assign_all<double>(const double*, int64_t, int64_t, const int64_t*, int64_t, int64_t, int64_t*, bool*);

}  // namespace vitkernels::host
