// Which thread attends to what: units of work, longest first, taken one after the other by whichever thread is free. Results do not depend on who takes what.
#pragma once

#include <cstdint>
#include <vector>

namespace vitkernels::packed {

// Query rows [q_begin, q_end) of a sequence, counted within it, for all heads that read one head of keys.
struct Unit {
  int32_t sequence, kv_head, q_begin, q_end;
};

struct Schedule {
  std::vector<Unit> units;       // the most expensive first
  std::vector<int64_t> batches;  // batch b is the units from batches[b] up to batches[b + 1]: several short sequences make one
};

// `split` allows the rows of one sequence to be cut between threads: each part packs the keys for itself, so a part is never shorter than least_rows.
Schedule make_schedule(const int32_t* cu_q, const int32_t* cu_k, const int32_t* used_k, int64_t sequences, int64_t kv_heads, int64_t threads, bool split);

// The same units, all that add to one part of a bias's gradient in one batch: so many sequences in a row, of one head of keys or, without `of_heads`, of all.
Schedule by_part(Schedule schedule, int64_t sequences, bool of_heads);

}  // namespace vitkernels::packed
