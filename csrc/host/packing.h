// Bin packing of images into token budgets, on plain arrays: no Python, no torch. vitkernels/navit/packing.py holds the same two rules in Python.
#pragma once

#include <cstdint>

namespace vitkernels::host {

// Both write to bin_of[i] the bin of item i, bins numbered in the order they are opened, and return the number of bins. Every length is in
// [0, capacity] and most, the items a bin may hold, at least 1; the caller checks it. O(count log count).

// Items in their order, each into the first bin that has room.
int64_t first_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t most, int64_t* bin_of);

// Items from the longest to the shortest (equal ones in their order), each into the fullest bin that has room, of equally full ones the first.
int64_t best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t most, int64_t* bin_of);

}  // namespace vitkernels::host
