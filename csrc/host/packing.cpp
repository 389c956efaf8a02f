#include "host/packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

namespace vitkernels::host {

int64_t first_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t most, int64_t* bin_of) {
  // A tree of maxima over the room left in every bin there could be; a bin not opened yet is an empty one. room[1] is the root.
  int64_t leaves = 1;
  while (leaves < count) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, capacity), items(count);
  int64_t bins = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (room[2 * node] < lengths[i]);
    bin_of[i] = node - leaves;
    bins = std::max(bins, bin_of[i] + 1);
    room[node] = ++items[bin_of[i]] < most ? room[node] - lengths[i] : -1;
    while (node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
  }
  return bins;
}

int64_t best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t most, int64_t* bin_of) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::set<std::pair<int64_t, int64_t>> open;  // (room left, bin)
  std::vector<int64_t> items(count);
  int64_t bins = 0;
  for (const int64_t i : order) {
    auto best = open.lower_bound({lengths[i], 0});
    if (best == open.end()) best = open.emplace(capacity, bins++).first;
    const auto [room, bin] = *best;
    bin_of[i] = bin;
    open.erase(best);
    if (++items[bin] < most) open.emplace(room - lengths[i], bin);
  }
  return bins;
}

}  // namespace vitkernels::host
