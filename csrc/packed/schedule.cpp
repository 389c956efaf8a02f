#include "packed/schedule.h"

#include <algorithm>
#include <utility>

namespace vitkernels::packed {
namespace {

// A part of a sequence packs all its keys, which costs as much as about ten rows of queries do.
constexpr int64_t kLeastRows = 128;
// Pairs of a query and a key in a batch, where there are enough: some fifty microseconds, in which every unit but the first finds its rows fetched.
constexpr int64_t kBatchPairs = 32768;
// Units a thread should find, so that the last ones end together.
constexpr int64_t kUnitsPerThread = 4;

}  // namespace

Schedule make_schedule(const int32_t* cu_q, const int32_t* cu_k, const int32_t* used_k, int64_t sequences, int64_t kv_heads, int64_t threads, bool split) {
  const auto keys = [&](int64_t s) -> int64_t { return used_k ? used_k[s] : cu_k[s + 1] - cu_k[s]; };
  // A row costs something without any keys, too.
  const auto pairs = [&](int64_t s, int64_t rows) { return (rows + 8) * (keys(s) + 8); };
  int64_t total = 0;
  std::vector<int32_t> order;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = cu_q[s + 1] - cu_q[s];
    if (rows == 0 && keys(s) == 0 && cu_k[s + 1] == cu_k[s]) continue;
    total += pairs(s, rows) * kv_heads;
    order.push_back(static_cast<int32_t>(s));
  }
  struct Part {
    Unit unit;
    int64_t cost;
  };
  std::vector<Part> parts;
  const int64_t most = threads > 1 ? std::max<int64_t>(total / (threads * kUnitsPerThread), 1) : total;
  for (const int32_t s : order) {
    const int64_t rows = cu_q[s + 1] - cu_q[s];
    int64_t count = 1;
    if (split && threads > 1) count = std::clamp<int64_t>((pairs(s, rows) + most - 1) / most, 1, std::max<int64_t>(rows / kLeastRows, 1));
    for (int64_t p = 0; p < count; ++p) {
      const int32_t begin = static_cast<int32_t>(rows * p / count), end = static_cast<int32_t>(rows * (p + 1) / count);
      for (int32_t h = 0; h < kv_heads; ++h) parts.push_back({{s, h, begin, end}, pairs(s, end - begin)});
    }
  }
  const auto dearer = [](const Part& a, const Part& b) { return a.cost > b.cost; };
  if (!std::is_sorted(parts.begin(), parts.end(), dearer)) std::stable_sort(parts.begin(), parts.end(), dearer);
  Schedule schedule;
  const int64_t batch = std::min(kBatchPairs, total / (threads * 2 * kUnitsPerThread));
  int64_t cost = 0;
  schedule.batches.push_back(0);
  for (const Part& part : parts) {
    schedule.units.push_back(part.unit);
    cost += part.cost;
    if (cost >= batch) {
      schedule.batches.push_back(static_cast<int64_t>(schedule.units.size()));
      cost = 0;
    }
  }
  if (cost > 0) schedule.batches.push_back(static_cast<int64_t>(schedule.units.size()));
  return schedule;
}

Schedule by_part(Schedule schedule, int64_t sequences, bool of_heads) {
  const auto part = [=](const Unit& unit) { return std::make_pair(unit.sequence / sequences, of_heads ? unit.kv_head : 0); };
  const auto less = [&](const Unit& a, const Unit& b) { return std::make_pair(part(a), a.sequence) < std::make_pair(part(b), b.sequence); };
  std::stable_sort(schedule.units.begin(), schedule.units.end(), less);
  schedule.batches.assign(1, 0);
  for (size_t i = 1; i <= schedule.units.size(); ++i) {
    if (i == schedule.units.size() || part(schedule.units[i]) != part(schedule.units[i - 1])) schedule.batches.push_back(static_cast<int64_t>(i));
  }
  return schedule;
}

}  // namespace vitkernels::packed
