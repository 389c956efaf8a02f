// Re-Attention's forward on a GPU with 16-bit elements, the code of one thread block: the logsumexp of 64 queries of a head, and, given these, the
// output of 16, 32 or 64 queries of all heads.
//
// A warp takes 16 queries x 8 keys of all heads. Each lane exponentiates its own four elements of every head's map, and as it has them in all heads, a
// pair of heads is one register. Through two kilobytes of the warp's shared memory they become rows of 16 heads, the mix is one m16n8k16 a row of
// eight elements, and the norm over the heads a sum over four lanes. The mixed maps of a tile of keys meet in shared memory, where the warps are
// shared out again, by heads, for the product with v.
//
// The maps are scaled by a power of two near N before float16 takes them, and the mix by one that makes its largest element one: float16 then holds
// both as exactly as TF32 would, in half the bits. Where the op's own elements are float16 the mix is two of them, so that only the maps are rounded, as
// they are in eager.
#pragma once

#include "common/warp.h"
#include "head_mixing/cuda_arguments.h"

namespace vitkernels::head_mixing::cuda {

using namespace vitkernels::cuda;

// The thread block at work. A phase is f(warp) on every warp; the next one starts when all have finished.
template <int kWarps>
struct Team {
  char* shared;
  int64_t index;  // of the block
#if !defined(__CUDACC__)
  const int* warp_order;  // a correct phase gives the same bits in any order
#endif
  // What a warp keeps in registers from phase to phase is an array of this many, at place_of(warp).
#if defined(__CUDACC__)
  static constexpr int kPlaces = 1;
  VITKERNELS_DEVICE static int place_of(int) { return 0; }
#else
  static constexpr int kPlaces = kWarps;
  static int place_of(int warp) { return warp; }
#endif

  // What the threads have started to copy has landed before the next phase.
  template <class F>
  VITKERNELS_DEVICE void phase(F&& f) const {
#if defined(__CUDACC__)
    f(static_cast<int>(threadIdx.x >> 5));
    copies_landed();
    __syncthreads();
#else
    for (int i = 0; i < kWarps; ++i) f(warp_order[i]);
#endif
  }
};

// Copies kRows rows from first_row on, 16 kSteps columns from first_column on, of kHeads heads from first_head on; `stride` bytes from row to row.
// Rows and columns beyond the last one are zeros, and so are heads beyond `heads`.
template <int kSteps, int kRows, int kHeads, int kWarps>
VITKERNELS_DEVICE void copy_rows(
    int warp, char* to, int stride, const Rows& from, int64_t sample, int first_head, int heads, int first_row, int rows, int first_column) {
  constexpr int kParts = kRows * 2 * kSteps, kThreads = 32 * kWarps;  // a head's, of 16 bytes
  constexpr int kAtOnce = kThreads > kParts ? kThreads / kParts : 1, kTimes = kParts > kThreads ? kParts / kThreads : 1;
  static_assert(kAtOnce * kParts == kThreads * kTimes);
  each_lane([&](int lane, int) {
    const int thread = 32 * warp + lane, first = thread / kParts;
    VITKERNELS_UNROLL
    for (int i = 0; i < kTimes; ++i) {
      const int part = thread % kParts + i * kThreads, column = part % (2 * kSteps), row = part / (2 * kSteps);
      const bool there = first_row + row < rows && first_column + 8 * column < from.columns;
      const int64_t offset = sample * from.sample + (first_head + first) * from.head + (there ? (first_row + row) * from.row + first_column + 8 * column : 0);
      const char* source = static_cast<const char*>(from.data) + 2 * offset;
      char* target = to + (first * kRows + row) * stride + 16 * column;
      VITKERNELS_UNROLL
      for (int h = 0; h < kHeads; h += kAtOnce) {
        if (kHeads % kAtOnce != 0 && h + first >= kHeads) break;
        const bool copied = there && h + first < heads;
        start_copy(target + h * kRows * stride, copied ? source : from.data, copied);
        source += 2 * kAtOnce * from.head;
      }
    }
  });
}

// s [16 x 8] = 16 rows of q times 8 rows of k, both in shared memory.
template <class T, int kSteps>
VITKERNELS_DEVICE void products(Lanes<float, 4>& s, const char* q, const char* k, int stride) {
  each_lane([&](int, int slot) {
    for (int e = 0; e < 4; ++e) s[slot][e] = 0;
  });
  VITKERNELS_UNROLL
  for (int d = 0; d < kSteps; d += 2) {
    Lanes<uint32_t, 4> keys;
    load_matrices<false>(keys, [&](int lane) { return k + lane % 8 * stride + 32 * d + lane / 8 * 16; });
    VITKERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {
      Lanes<uint32_t, 4> queries;
      load_matrices<false>(queries, [&](int lane) { return q + lane % 16 * stride + 32 * (d + half) + lane / 16 * 16; });
      mma<T>(s, queries, keys, 2 * half, s);
    }
  }
}

// --- the logsumexp --------------------------------------------------------------------------------------------------------------------------

template <int kSteps>
constexpr int kLseShared = (kLseQueries + 2 * kLseKeys) * (32 * kSteps + 16);

template <class T, int kSteps>
VITKERNELS_DEVICE void lse_block(const Team<kLseWarps>& team, const Arguments& a) {
  constexpr int kRow = 32 * kSteps + 16, kGroups = kLseKeys / 8;
  const int tiles = (a.tokens + kLseQueries - 1) / kLseQueries, start = static_cast<int>(team.index % tiles) * kLseQueries;
  const int64_t map = team.index / tiles, sample = map / a.heads;
  const int head = static_cast<int>(map % a.heads);
  const float scale = fabsf(a.scale_log2);
  char *q = team.shared, *k = q + kLseQueries * kRow;
  struct State {
    Lanes<uint32_t, 4> q[kSteps];
    Lanes<float, 2> largest, sum;
  };
  State states[Team<kLseWarps>::kPlaces];

  team.phase([&](int warp) {
    copy_rows<kSteps, kLseQueries, 1, kLseWarps>(warp, q, kRow, a.q, sample, head, 1, start, a.tokens, 0);
    copy_rows<kSteps, kLseKeys, 1, kLseWarps>(warp, k, kRow, a.k, sample, head, 1, 0, a.tokens, 0);
  });
  for (int n = 0; n < a.tokens; n += kLseKeys) {
    const char* now = k + n / kLseKeys % 2 * kLseKeys * kRow;
    team.phase([&](int warp) {
      if (n + kLseKeys < a.tokens) {
        char* next = k + (n / kLseKeys + 1) % 2 * kLseKeys * kRow;
        copy_rows<kSteps, kLseKeys, 1, kLseWarps>(warp, next, kRow, a.k, sample, head, 1, n + kLseKeys, a.tokens, 0);
      }
      if (start + 16 * warp >= a.tokens) return;
      State& state = states[team.place_of(warp)];
      if (n == 0) {
        VITKERNELS_UNROLL
        for (int d = 0; d < kSteps; ++d) {
          load_matrices<false>(state.q[d], [&](int lane) { return q + (16 * warp + lane % 16) * kRow + 32 * d + lane / 16 * 16; });
          each_lane([&](int, int slot) {  // the largest logit is the largest product: a negative scale changes the queries' signs
            if (a.scale_log2 < 0) {
              for (int i = 0; i < 4; ++i) state.q[d][slot][i] ^= 0x80008000u;
            }
          });
        }
        each_lane([&](int, int slot) {
          for (int r = 0; r < 2; ++r) state.largest[slot][r] = -INFINITY, state.sum[slot][r] = 0;
        });
      }
      Lanes<float, 4> s[kGroups];
      Lanes<float, 2> top;
      VITKERNELS_UNROLL
      for (int i = 0; i < kGroups; ++i) {
        each_lane([&](int, int slot) {
          for (int e = 0; e < 4; ++e) s[i][slot][e] = 0;
        });
        VITKERNELS_UNROLL
        for (int d = 0; d < kSteps; d += 2) {
          Lanes<uint32_t, 4> keys;
          load_matrices<false>(keys, [&](int lane) { return now + (8 * i + lane % 8) * kRow + 32 * d + lane / 8 * 16; });
          mma<T>(s[i], state.q[d], keys, 0, s[i]);
          mma<T>(s[i], state.q[d + 1], keys, 2, s[i]);
        }
      }
      each_lane([&](int lane, int slot) {
        if (n + kLseKeys > a.tokens) {
          VITKERNELS_UNROLL
          for (int i = 0; i < kGroups; ++i) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 4; ++e) {
              if (n + 8 * i + lane % 4 * 2 + (e & 1) >= a.tokens) s[i][slot][e] = -INFINITY;
            }
          }
        }
        VITKERNELS_UNROLL
        for (int r = 0; r < 2; ++r) top[slot][r] = s[0][slot][2 * r];
        VITKERNELS_UNROLL
        for (int i = 0; i < kGroups; ++i) {
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) top[slot][e / 2] = fmaxf(top[slot][e / 2], s[i][slot][e]);
        }
      });
      row_max(top);
      each_lane([&](int, int slot) {
        VITKERNELS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float before = state.largest[slot][r];
          state.largest[slot][r] = top[slot][r] = fmaxf(before, top[slot][r] * scale);
          state.sum[slot][r] *= exp2_fast(before - top[slot][r]);
        }
        VITKERNELS_UNROLL
        for (int i = 0; i < kGroups; ++i) {
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) state.sum[slot][e / 2] += exp2_fast(fmaf(s[i][slot][e], scale, -top[slot][e / 2]));
        }
      });
    });
  }
  team.phase([&](int warp) {
    if (start + 16 * warp >= a.tokens) return;
    State& state = states[team.place_of(warp)];
    row_sum(state.sum);
    each_lane([&](int lane, int slot) {
      for (int r = 0; r < 2; ++r) {
        const int row = start + 16 * warp + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < a.tokens) {
          a.lse[map * a.tokens + row] = (static_cast<double>(state.largest[slot][r]) + static_cast<double>(log2f(state.sum[slot][r]))) / kLog2E;
        }
      }
    });
  });
}

// --- the mix as the tensor cores take it ----------------------------------------------------------------------------------------------------

// A power of two near the number of keys: times it, a flat map is near one.
VITKERNELS_DEVICE int map_exponent(int tokens) {
  int exponent = 0;
  while (exponent < 14 && (2 << exponent) <= tokens) ++exponent;
  return exponent;
}

// One block, beside those of the logsumexp: mix and norm folded, in float64.
VITKERNELS_DEVICE void fold_block(const Team<kLseWarps>& team, const Arguments& a) {
  const Small& small = a.small;
  const int heads = a.heads;
  double* mix = reinterpret_cast<double*>(team.shared);  // [heads, heads]
  double *factor = mix + kMaxHeads * kMaxHeads, *added = factor + kMaxHeads, *largest = added + kMaxHeads;
  const auto or_zero = [&](const double* values, int i) { return values ? values[i] : 0.0; };
  team.phase([&](int warp) {
    threads_over<kLseWarps>(warp, heads, [&](int g) {
      factor[g] = 1, added[g] = or_zero(small.bias, g);
      if (small.norm == Norm::kBatch) {
        factor[g] = (small.weight ? small.weight[g] : 1.0) / sqrt(small.var[g] + small.eps);
        added[g] = (added[g] - small.mean[g]) * factor[g] + or_zero(small.norm_bias, g);
      } else if (small.norm == Norm::kLayer && small.bias) {
        double mean = 0;
        for (int i = 0; i < heads; ++i) mean += small.bias[i];
        added[g] -= mean / heads;
      }
    });
  });
  team.phase([&](int warp) {
    threads_over<kLseWarps>(warp, heads * heads, [&](int i) {
      double mean = 0;  // over the output heads, which a layer norm takes off
      if (small.norm == Norm::kLayer) {
        for (int g = 0; g < heads; ++g) mean += small.mix[g * heads + i % heads];
      }
      mix[i] = (small.mix[i] - mean / heads) * factor[i / heads];
    });
  });
  team.phase([&](int warp) {
    threads_over<kLseWarps>(warp, heads, [&](int g) {
      double most = 0;
      for (int h = 0; h < heads; ++h) most = fmax(most, fabs(mix[g * heads + h]));
      largest[g] = most;
    });
  });
  team.phase([&](int warp) {
    double most = 0;
    for (int g = 0; g < heads; ++g) most = fmax(most, largest[g]);
    int exponent = 0;
    if (most > 0 && most < INFINITY) frexp(most, &exponent);
    const double scale = ldexp(1.0, exponent - 1 - map_exponent(a.tokens));
    threads_over<kLseWarps>(warp, kMaxHeads * kMaxHeads, [&](int i) {
      const int g = i / kMaxHeads, h = i % kMaxHeads;
      const float x = g < heads && h < heads ? static_cast<float>(ldexp(mix[g * heads + h], 1 - exponent)) : 0.0f;
      a.folded->mix[g][h] = from_float<Float16>(x);
      a.folded->rest[g][h] = from_float<Float16>(x - to_float(from_float<Float16>(x)));
    });
    threads_over<kLseWarps>(warp, kMaxHeads, [&](int g) {
      const bool there = g < heads, layer = there && small.norm == Norm::kLayer;
      a.folded->start[g] = there ? static_cast<float>(added[g] / scale) : 0.0f;
      a.folded->weight[g] = layer && small.weight ? static_cast<float>(small.weight[g]) : 1.0f;
      a.folded->bias[g] = layer ? static_cast<float>(or_zero(small.norm_bias, g)) : 0.0f;
      if (g == 0) a.folded->scale = static_cast<float>(scale), a.folded->eps = static_cast<float>(small.eps / scale / scale);
    });
  });
}

// --- the rows -------------------------------------------------------------------------------------------------------------------------------

// Sixteen bytes at once.
struct alignas(16) Four {
  uint32_t value[4];
};

template <class T, class Plan>
struct RowsBlock {
  using Crew = Team<Plan::kWarps>;
  static constexpr int kHeadsOfWarp = (Plan::kHeads + kKeyGroups - 1) / kKeyGroups, kTiles = (Plan::kHeads + 7) / 8;

  const Crew& team;
  const Arguments& a;
  int64_t sample;
  int start, first_column;
  Lanes<float, 4> acc[Crew::kPlaces][kHeadsOfWarp][2 * Plan::kSteps];

  VITKERNELS_DEVICE RowsBlock(const Crew& team, const Arguments& a) : team(team), a(a) {
    const int chunks = (a.value_dim + Plan::kColumns - 1) / Plan::kColumns, tiles = (a.tokens + Plan::kQueries - 1) / Plan::kQueries;
    first_column = static_cast<int>(team.index % chunks) * Plan::kColumns;
    start = static_cast<int>(team.index / chunks % tiles) * Plan::kQueries;
    sample = team.index / chunks / tiles;
  }

  VITKERNELS_DEVICE char* at(int place) const { return team.shared + place; }
  VITKERNELS_DEVICE const Folded& folded() const { return *reinterpret_cast<const Folded*>(at(Plan::kFolded)); }
  // Warps share out queries, and within these keys for the maps, heads for the product with v.
  VITKERNELS_DEVICE static int row_group(int warp) { return warp % Plan::kRowGroups; }
  VITKERNELS_DEVICE static int share(int warp) { return warp / Plan::kRowGroups; }
  VITKERNELS_DEVICE bool idle(int warp) const { return start + 16 * row_group(warp) >= a.tokens; }

  // Of the warp's j-th head, 8 columns each.
  VITKERNELS_DEVICE Lanes<float, 4>* sums(int warp, int j) { return acc[team.place_of(warp)][j]; }

  VITKERNELS_DEVICE void copy_keys(int warp, int place, const Rows& from, int first_key, int column) const {
    copy_rows<Plan::kSteps, kKeys, Plan::kHeads, Plan::kWarps>(warp, at(place), Plan::kRow, from, sample, 0, a.heads, first_key, a.tokens, column);
  }

  VITKERNELS_DEVICE void run() {
    const int exponent = map_exponent(a.tokens);
    team.phase([&](int warp) {
      copy_rows<Plan::kSteps, Plan::kQueries, Plan::kHeads, Plan::kWarps>(warp, at(Plan::kQ), Plan::kRow, a.q, sample, 0, a.heads, start, a.tokens, 0);
      copy_keys(warp, Plan::kK, a.k, 0, 0);
      threads_over<Plan::kWarps>(warp, static_cast<int>(sizeof(Folded) / 16), [&](int i) {
        start_copy(at(Plan::kFolded + 16 * i), reinterpret_cast<const char*>(a.folded) + 16 * i, true);
      });
      threads_over<Plan::kWarps>(warp, Plan::kHeads * Plan::kQueries, [&](int i) {
        // The two rows that a lane has a part of, r and r + 8, side by side.
        const int h = i / Plan::kQueries, within = i % 16, row = start + i % Plan::kQueries / 16 * 16 + within / 2 + within % 2 * 8;
        const bool there = h < a.heads && row < a.tokens;
        const double lse = there ? a.lse[(sample * a.heads + h) * a.tokens + row] : 0;
        reinterpret_cast<float*>(at(Plan::kLse))[i] = there ? static_cast<float>(lse * kLog2E - exponent) : INFINITY;
      });
      each_lane([&](int, int slot) {
        VITKERNELS_UNROLL
        for (int j = 0; j < kHeadsOfWarp; ++j) {
          VITKERNELS_UNROLL
          for (int n = 0; n < 2 * Plan::kSteps; ++n) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 4; ++e) sums(warp, j)[n][slot][e] = 0;
          }
        }
      });
    });
    for (int n = 0; n < a.tokens; n += kKeys) {
      team.phase([&](int warp) {
        copy_keys(warp, Plan::kV, a.v, n, first_column);
        if (!idle(warp)) map(warp, n);
      });
      team.phase([&](int warp) {
        if (n + kKeys < a.tokens) copy_keys(warp, Plan::kK, a.k, n + kKeys, 0);
        if (!idle(warp)) apply(warp);
      });
    }
    team.phase([&](int warp) {
      if (!idle(warp)) store(warp);
    });
  }

  // The mixed and normed maps of 16 queries and 8 keys.
  VITKERNELS_DEVICE void map(int warp, int n) {
    const char* q = at(Plan::kQ + 16 * row_group(warp) * Plan::kRow);
    const char* k = at(Plan::kK + 8 * share(warp) * Plan::kRow);
    const float* lse = reinterpret_cast<const float*>(at(Plan::kLse)) + 16 * row_group(warp);
    const int first_key = n + 8 * share(warp);
    Lanes<uint32_t, 2 * Plan::kHeads> x;  // heads 2j and 2j + 1 of element e: register 4j + e
    VITKERNELS_UNROLL
    for (int j = 0; j < Plan::kHeads / 2; ++j) {
      Lanes<float, 4> s[2];
      VITKERNELS_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int h = 2 * j + u;  // one that is not there has zeros for q and k, and an infinite logsumexp
        products<T, Plan::kSteps>(s[u], q + h * Plan::kQueries * Plan::kRow, k + h * kKeys * Plan::kRow, Plan::kRow);
      }
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int u = 0; u < 2; ++u) {
          const Pair<float> shift = load_pair(lse + (2 * j + u) * Plan::kQueries + lane / 4 * 2);
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) s[u][slot][e] = exp2_fast(fmaf(s[u][slot][e], a.scale_log2, -(e < 2 ? shift.first : shift.second)));
        }
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; ++e) x[slot][4 * j + e] = packed<Float16>(s[0][slot][e], s[1][slot][e]);
      });
    }
    if (first_key + 8 > a.tokens) {  // v is zero beyond the last key, and this only has to be finite
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int i = 0; i < 2 * Plan::kHeads; ++i) {
          if (first_key + lane % 4 * 2 + (i & 1) >= a.tokens) x[slot][i] = 0;
        }
      });
    }
    Lanes<uint32_t, 4> mix, rest;  // of columns 8 i + ..., registers 2 i and 2 i + 1
    Lanes<float, 4> first[kTiles];
    Lanes<float, 2> weight[kTiles], bias[kTiles];
    each_lane([&](int lane, int slot) {
      VITKERNELS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int g = 8 * (i / 2) + lane / 4, h = 8 * (i % 2) + lane % 4 * 2;
        mix[slot][i] = bits_of(load_pair(&folded().mix[g][h])), rest[slot][i] = bits_of(load_pair(&folded().rest[g][h]));
      }
      VITKERNELS_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        VITKERNELS_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int g = 8 * i + lane % 4 * 2 + e;
          first[i][slot][e] = first[i][slot][2 + e] = folded().start[g];
          weight[i][slot][e] = folded().weight[g], bias[i][slot][e] = folded().bias[g];
        }
      }
    });
    char* exchange = at(Plan::kExchanges + warp * Plan::kExchange);
    char* maps = at(Plan::kMaps + 16 * row_group(warp) * Plan::kMapRow + 16 * share(warp));
    const bool layer = a.small.norm == Norm::kLayer;
    const float per_head = 1.0f / static_cast<float>(a.heads), eps = folded().eps, scale = folded().scale;
    // An element's row of heads, in two parts of 16 bytes. Rows of the even keys of a query come first, then those of the odd ones; and of every other
    // query the two parts change places, so that what is written and what is read at once lies in different banks.
    const auto place = [&](int query, int key, int part) { return exchange + query * 256 + key % 2 * 128 + key / 2 * 32 + (part ^ (query & 1)) * 16; };
    VITKERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {  // queries 0 to 7 and 8 to 15
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int e = 0; e < 2; ++e) {
          VITKERNELS_UNROLL
          for (int part = 0; part < kTiles; ++part) {
            Four four;
            VITKERNELS_UNROLL
            for (int i = 0; i < 4; ++i) four.value[i] = 4 * part + i < Plan::kHeads / 2 ? x[slot][4 * (4 * part + i) + 2 * half + e] : 0;
            *reinterpret_cast<Four*>(place(lane / 4, lane % 4 * 2 + e, part)) = four;
          }
        }
      });
      warp_barrier();
      // Two queries x 8 keys at a time. Row i of the product is query i / 4 and key 2 (i % 4), row i + 8 the key after it: a lane has neighbours.
      Lanes<float, 4> z[4][kTiles];
      VITKERNELS_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        Lanes<uint32_t, 4> elements;
        load_matrices<false>(elements, [&](int lane) {
          return place(2 * pair + lane % 8 / 4, lane % 4 * 2 + lane / 8 % 2, kTiles > 1 ? lane / 16 : 0);
        });
        VITKERNELS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
          mma<Float16>(z[pair][i], elements, mix, 2 * i, first[i]);
          if constexpr (std::is_same_v<T, Float16>) mma<Float16>(z[pair][i], elements, rest, 2 * i, z[pair][i]);
        }
      }
      warp_barrier();
      if (layer) {
        VITKERNELS_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
          Lanes<float, 2> squares;
          each_lane([&](int, int slot) {
            squares[slot][0] = squares[slot][1] = 0;
            VITKERNELS_UNROLL
            for (int i = 0; i < kTiles; ++i) {
              VITKERNELS_UNROLL
              for (int e = 0; e < 4; ++e) squares[slot][e / 2] = fmaf(z[pair][i][slot][e], z[pair][i][slot][e], squares[slot][e / 2]);
            }
          });
          row_sum(squares);
          each_lane([&](int, int slot) {
            VITKERNELS_UNROLL
            for (int r = 0; r < 2; ++r) {
              const float inverse = inverse_root(fmaf(squares[slot][r], per_head, eps));
              VITKERNELS_UNROLL
              for (int i = 0; i < kTiles; ++i) {
                VITKERNELS_UNROLL
                for (int e = 0; e < 2; ++e) z[pair][i][slot][2 * r + e] = fmaf(z[pair][i][slot][2 * r + e] * inverse, weight[i][slot][e], bias[i][slot][e]);
              }
            }
          });
        }
      } else {
        each_lane([&](int, int slot) {
          VITKERNELS_UNROLL
          for (int i = 0; i < 4 * kTiles * 4; ++i) z[i / 4 / kTiles][i / 4 % kTiles][slot][i % 4] *= scale;
        });
      }
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
          const int row = 8 * half + 2 * pair + lane / 16, key = lane / 4 % 4 * 2;
          VITKERNELS_UNROLL
          for (int i = 0; i < kTiles; ++i) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int g = 8 * i + lane % 4 * 2 + e;
              if (8 * i + 8 > Plan::kHeads && g >= Plan::kHeads) continue;
              *reinterpret_cast<uint32_t*>(maps + g * Plan::kMapHead + row * Plan::kMapRow + 2 * key) =
                  packed<T>(z[pair][i][slot][e], z[pair][i][slot][2 + e]);
            }
          }
        }
      });
    }
  }

  // Of a fourth of the heads: the maps of 16 queries and 32 keys times the keys' values.
  VITKERNELS_DEVICE void apply(int warp) {
    VITKERNELS_UNROLL
    for (int j = 0; j < kHeadsOfWarp; ++j) {
      const int h = share(warp) + kKeyGroups * j;
      if (h >= a.heads) continue;
      const char* maps = at(Plan::kMaps + h * Plan::kMapHead + 16 * row_group(warp) * Plan::kMapRow);
      const char* v = at(Plan::kV + h * kKeys * Plan::kRow);
      VITKERNELS_UNROLL
      for (int k = 0; k < kKeys; k += 16) {
        Lanes<uint32_t, 4> left;
        load_matrices<false>(left, [&](int lane) { return maps + lane % 16 * Plan::kMapRow + 2 * k + lane / 16 * 16; });
        VITKERNELS_UNROLL
        for (int c = 0; c < Plan::kSteps; ++c) {
          Lanes<uint32_t, 4> right;
          load_matrices<true>(right, [&](int lane) { return v + (k + lane % 16) * Plan::kRow + 32 * c + lane / 16 * 16; });
          VITKERNELS_UNROLL
          for (int i = 0; i < 2; ++i) mma<T>(sums(warp, j)[2 * c + i], left, right, 2 * i, sums(warp, j)[2 * c + i]);
        }
      }
    }
  }

  VITKERNELS_DEVICE void store(int warp) {
    T* out = static_cast<T*>(a.out);
    VITKERNELS_UNROLL
    for (int j = 0; j < kHeadsOfWarp; ++j) {
      const int h = share(warp) + kKeyGroups * j;
      if (h >= a.heads) continue;
      each_lane([&](int lane, int slot) {
        VITKERNELS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = start + 16 * row_group(warp) + lane / 4 + 8 * r;
          if (row >= a.tokens) continue;
          T* to = out + ((sample * a.tokens + row) * a.heads + h) * a.value_dim;
          VITKERNELS_UNROLL
          for (int n = 0; n < 2 * Plan::kSteps; ++n) {
            const int column = first_column + 8 * n + lane % 4 * 2;
            const float* value = &sums(warp, j)[n][slot][2 * r];
            if (a.value_dim % 2 == 0) {
              if (column < a.value_dim) store_pair(to + column, value[0], value[1]);
            } else {
              if (column < a.value_dim) to[column] = from_float<T>(value[0]);
              if (column + 1 < a.value_dim) to[column + 1] = from_float<T>(value[1]);
            }
          }
        }
      });
    }
  }
};

template <class T, class Plan>
VITKERNELS_DEVICE void rows_block(const Team<Plan::kWarps>& team, const Arguments& a) {
  RowsBlock<T, Plan>(team, a).run();
}

}  // namespace vitkernels::head_mixing::cuda
