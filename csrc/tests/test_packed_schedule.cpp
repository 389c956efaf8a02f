// The units of packed attention: every pair of a query row and a head of keys is in exactly one, the expensive ones come first, and none is cut too short.
#include "packed/schedule.h"

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "check.h"

using vitkernels::packed::by_part;
using vitkernels::packed::make_schedule;
using vitkernels::packed::Schedule;
using vitkernels::packed::Unit;

namespace {

std::vector<int32_t> cumulative(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> cu(1, 0);
  for (const int32_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

void covers(const std::vector<int32_t>& queries, const std::vector<int32_t>& keys, int64_t kv_heads, int64_t threads, bool split) {
  const std::vector<int32_t> cu_q = cumulative(queries), cu_k = cumulative(keys);
  const Schedule schedule = make_schedule(cu_q.data(), cu_k.data(), nullptr, static_cast<int64_t>(queries.size()), kv_heads, threads, split);
  std::map<std::pair<int32_t, int32_t>, int64_t> rows;  // of a sequence and a head
  int64_t last = -1;
  for (const Unit& unit : schedule.units) {
    CHECK(unit.q_begin <= unit.q_end && unit.q_end <= queries[unit.sequence], "rows %d to %d of sequence %d", unit.q_begin, unit.q_end, unit.sequence);
    const int64_t count = unit.q_end - unit.q_begin, cost = (count + 8) * (keys[unit.sequence] + 8);
    CHECK(count == queries[unit.sequence] || count >= 128, "a part of %ld rows", long(count));
    CHECK(split || count == queries[unit.sequence], "sequence %d is cut", unit.sequence);
    CHECK(last < 0 || cost <= last, "a unit of %ld pairs comes after one of %ld", long(cost), long(last));
    last = cost;
    rows[{unit.sequence, unit.kv_head}] += count;
  }
  for (size_t s = 0; s < queries.size(); ++s) {
    for (int32_t h = 0; h < kv_heads; ++h) {
      const bool wanted = queries[s] > 0 || keys[s] > 0;
      const auto found = rows.find(std::make_pair(static_cast<int32_t>(s), h));
      CHECK((found != rows.end()) == wanted, "sequence %zu, head %d", s, h);
      CHECK(!wanted || found->second == queries[s], "sequence %zu, head %d", s, h);
    }
  }
  CHECK(schedule.batches.front() == 0 && schedule.batches.back() == static_cast<int64_t>(schedule.units.size()), "batches end at %ld", long(schedule.batches.back()));
  for (size_t b = 1; b < schedule.batches.size(); ++b) CHECK(schedule.batches[b - 1] < schedule.batches[b], "batch %zu is empty", b);

  for (const int64_t sequences : {1, 3, 1000}) {
    for (const bool of_heads : {false, true}) {
      const Schedule parts = by_part(schedule, sequences, of_heads);
      const auto part = [&](int64_t i) { return std::make_pair(parts.units[i].sequence / sequences, of_heads ? parts.units[i].kv_head : 0); };
      std::set<std::pair<int64_t, int32_t>> seen;
      for (size_t b = 1; b < parts.batches.size(); ++b) {
        const auto first = part(parts.batches[b - 1]);
        CHECK(seen.insert(first).second, "part %ld of head %d is in two batches", long(first.first), first.second);
        for (int64_t i = parts.batches[b - 1]; i < parts.batches[b]; ++i) CHECK(part(i) == first, "unit %ld is of another part", long(i));
      }
      CHECK(parts.batches.back() == static_cast<int64_t>(parts.units.size()), "%zu units", parts.units.size());
    }
  }
}

}  // namespace

int main() {
  for (const int64_t threads : {1, 2, 3, 64}) {
    for (const bool split : {false, true}) {
      covers({}, {}, 3, threads, split);
      covers({0, 0}, {0, 0}, 2, threads, split);
      covers({5, 0, 1, 0}, {5, 7, 0, 0}, 2, threads, split);
      covers({4097}, {4097}, 1, threads, split);
      covers({1024, 1, 1, 1, 64, 63, 65, 300}, {1024, 1, 1, 1, 64, 63, 65, 300}, 12, threads, split);
      covers(std::vector<int32_t>(100, 7), std::vector<int32_t>(100, 7), 3, threads, split);
    }
  }
  return vitkernels::test::finish();
}
