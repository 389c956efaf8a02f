// Re-Attention's forward on a GPU with 16-bit elements, the code of one thread block: the logsumexp of 64 queries of a head, and, given these, the
// output of 16 or 32 queries of all heads.
//
// A warp takes 16 queries x 8 keys of all heads. Each lane exponentiates its own four elements of every head's map, and as it has them in all heads, a
// pair of heads is one register. Through two kilobytes of the warp's shared memory they become rows of 16 heads, the mix is one m16n8k16 a row of
// eight elements, and the norm over the heads a sum over four lanes. The mixed maps of a tile of keys meet in shared memory, where the warps are
// shared out again, by heads, for the product with v.
//
// The maps are centred by 1 / N and scaled by a power of two near N before float16 takes them, and each row of the mix is scaled to begin with a one:
// float16 then holds both as exactly as TF32 would, in half the bits. What was taken off comes back, in float32, with the bias. Where the op's own
// elements are float16 the mix is two of them, so that only the maps are rounded, as they are in eager.
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

  // f(i) for i below count, the threads of the block taking turns.
  template <class F>
  VITKERNELS_DEVICE void each(int warp, int count, F&& f) const {
    each_lane([&](int lane, int) {
      for (int i = 32 * warp + lane; i < count; i += 32 * kWarps) f(i);
    });
  }
};

// Copies kRows rows from first_row on of all heads from first_head on, 16 kSteps columns from first_column on, to rows of `stride` bytes.
template <int kSteps, int kRows, class Team>
VITKERNELS_DEVICE void copy_rows(
    const Team& team, int warp, char* to, int stride, const Rows& from, int64_t sample, int first_head, int heads, int first_row, int rows,
    int first_column) {
  const char* base = static_cast<const char*>(from.data) + 2 * (sample * from.sample + first_head * from.head + first_column);
  team.each(warp, heads * kRows * 2 * kSteps, [&](int i) {
    const int part = i % (2 * kSteps), row = i / (2 * kSteps) % kRows, head = i / (2 * kSteps) / kRows;
    const bool there = first_row + row < rows && first_column + 8 * part < from.columns;
    const int64_t offset = there ? head * from.head + (first_row + row) * from.row + 8 * part : 0;
    start_copy(to + (head * kRows + row) * stride + 16 * part, base + 2 * offset, there);
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
      mma<T>(s, queries, keys, 2 * half);
    }
  }
}

// --- the logsumexp --------------------------------------------------------------------------------------------------------------------------

template <int kSteps>
constexpr int kLseShared = (kLseQueries + 2 * kLseKeys) * (32 * kSteps + 16);

template <class T, int kSteps>
VITKERNELS_DEVICE void lse_block(const Team<kLseWarps>& team, const Arguments& a) {
  constexpr int kRow = 32 * kSteps + 16;
  const int tiles = (a.tokens + kLseQueries - 1) / kLseQueries, start = static_cast<int>(team.index % tiles) * kLseQueries;
  const int64_t map = team.index / tiles, sample = map / a.heads;
  const int head = static_cast<int>(map % a.heads);
  char *q = team.shared, *k = q + kLseQueries * kRow;
  Lanes<float, 2> largest[Team<kLseWarps>::kPlaces], sum[Team<kLseWarps>::kPlaces];

  team.phase([&](int warp) {
    copy_rows<kSteps, kLseQueries>(team, warp, q, kRow, a.q, sample, head, 1, start, a.tokens, 0);
    copy_rows<kSteps, kLseKeys>(team, warp, k, kRow, a.k, sample, head, 1, 0, a.tokens, 0);
    each_lane([&](int, int slot) {
      for (int i = 0; i < 2; ++i) largest[team.place_of(warp)][slot][i] = -INFINITY, sum[team.place_of(warp)][slot][i] = 0;
    });
  });
  for (int n = 0; n < a.tokens; n += kLseKeys) {
    const char* now = k + n / kLseKeys % 2 * kLseKeys * kRow;
    team.phase([&](int warp) {
      if (n + kLseKeys < a.tokens) {
        char* next = k + (n / kLseKeys + 1) % 2 * kLseKeys * kRow;
        copy_rows<kSteps, kLseKeys>(team, warp, next, kRow, a.k, sample, head, 1, n + kLseKeys, a.tokens, 0);
      }
      Lanes<float, 4> s[kLseKeys / 8];
      VITKERNELS_UNROLL
      for (int i = 0; i < kLseKeys / 8; ++i) products<T, kSteps>(s[i], q + 16 * warp * kRow, now + 8 * i * kRow, kRow);
      Lanes<float, 2>&high = largest[team.place_of(warp)], &total = sum[team.place_of(warp)];
      Lanes<float, 2> top;
      each_lane([&](int lane, int slot) {
        top[slot][0] = high[slot][0], top[slot][1] = high[slot][1];
        VITKERNELS_UNROLL
        for (int i = 0; i < kLseKeys / 8; ++i) {
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) {
            float& x = s[i][slot][e];
            if (n + 8 * i + lane % 4 * 2 + (e & 1) >= a.tokens) x = a.scale_log2 < 0 ? INFINITY : -INFINITY;
            top[slot][e / 2] = fmaxf(top[slot][e / 2], x * a.scale_log2);
          }
        }
      });
      row_max(top);
      each_lane([&](int, int slot) {
        VITKERNELS_UNROLL
        for (int r = 0; r < 2; ++r) total[slot][r] *= exp2_fast(high[slot][r] - top[slot][r]), high[slot][r] = top[slot][r];
        VITKERNELS_UNROLL
        for (int i = 0; i < kLseKeys / 8; ++i) {
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) total[slot][e / 2] += exp2_fast(fmaf(s[i][slot][e], a.scale_log2, -top[slot][e / 2]));
        }
      });
    });
  }
  team.phase([&](int warp) {
    Lanes<float, 2>&high = largest[team.place_of(warp)], &total = sum[team.place_of(warp)];
    row_sum(total);
    each_lane([&](int lane, int slot) {
      for (int r = 0; r < 2; ++r) {
        const int row = start + 16 * warp + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < a.tokens) {
          a.lse[map * a.tokens + row] = (static_cast<double>(high[slot][r]) + static_cast<double>(log2f(total[slot][r]))) / kLog2E;
        }
      }
    });
  });
}

// --- the mix as the tensor cores take it ----------------------------------------------------------------------------------------------------

// Of each output head: what its row of products is multiplied by, what is added to that, and weight and bias of a layer norm.
struct Vectors {
  float *factor, *constant, *weight, *bias;
  VITKERNELS_DEVICE explicit Vectors(char* at)
      : factor(reinterpret_cast<float*>(at)), constant(factor + kMaxHeads), weight(constant + kMaxHeads), bias(weight + kMaxHeads) {}
};

// One row of it and, one matrix further, what float16 rounded off; by one thread, in float64. map_scale: what the maps were multiplied by, after `centre` was taken off.
VITKERNELS_DEVICE void fold_row(const Small& small, int heads, int g, double map_scale, double centre, Float16* mix, const Vectors& to) {
  const auto or_zero = [&](const double* values, int i) { return values ? values[i] : 0.0; };
  double factor = 1, added = or_zero(small.bias, g);
  if (small.norm == Norm::kBatch) {
    factor = (small.weight ? small.weight[g] : 1.0) / sqrt(small.var[g] + small.eps);
    added = (added - small.mean[g]) * factor + or_zero(small.norm_bias, g);
  } else if (small.norm == Norm::kLayer && small.bias) {
    double mean = 0;
    for (int i = 0; i < heads; ++i) mean += small.bias[i];
    added -= mean / heads;
  }
  const auto entry = [&](int h) {
    double mean = 0;  // over the output heads, which a layer norm takes off
    if (small.norm == Norm::kLayer) {
      for (int i = 0; i < heads; ++i) mean += small.mix[i * heads + h];
    }
    return (small.mix[g * heads + h] - mean / heads) * factor;
  };
  double largest = 0, sum = 0;
  for (int h = 0; h < heads; ++h) {
    const double x = entry(h);
    largest = fmax(largest, fabs(x)), sum += x;
  }
  int exponent = 0;
  if (largest > 0 && largest < INFINITY) frexp(largest, &exponent);
  for (int h = 0; h < kMaxHeads; ++h) {
    const float x = h < heads ? static_cast<float>(ldexp(entry(h), 1 - exponent)) : 0.0f;
    mix[h] = from_float<Float16>(x);
    mix[kMaxHeads * kMaxHeads + h] = from_float<Float16>(x - to_float(mix[h]));
  }
  to.factor[g] = static_cast<float>(ldexp(1.0, exponent - 1) / map_scale);
  to.constant[g] = static_cast<float>(added + sum * centre);
  to.weight[g] = small.norm == Norm::kLayer && small.weight ? static_cast<float>(small.weight[g]) : 1.0f;
  to.bias[g] = small.norm == Norm::kLayer ? static_cast<float>(or_zero(small.norm_bias, g)) : 0.0f;
}

// --- the rows -------------------------------------------------------------------------------------------------------------------------------

// Sixteen bytes at once.
struct alignas(16) Four {
  uint32_t value[4];
};

// A power of two near the number of keys: times it, a flat map is near one.
VITKERNELS_DEVICE int map_exponent(int tokens) {
  int exponent = 0;
  while (exponent < 14 && (2 << exponent) <= tokens) ++exponent;
  return exponent;
}

template <class T, class Plan>
struct RowsBlock {
  using Crew = Team<Plan::kWarps>;
  static constexpr int kHeadsOfWarp = (Plan::kHeads + kKeyGroups - 1) / kKeyGroups, kTiles = (Plan::kHeads + 7) / 8;

  const Crew& team;
  const Arguments& a;
  typename Plan::Places places;
  int64_t sample;
  int start, first_column;
  Lanes<float, 4> acc[Crew::kPlaces][kHeadsOfWarp][2 * Plan::kSteps];

  VITKERNELS_DEVICE RowsBlock(const Crew& team, const Arguments& a) : team(team), a(a), places(Plan::places(a.heads)) {
    const int chunks = (a.value_dim + Plan::kColumns - 1) / Plan::kColumns, tiles = (a.tokens + Plan::kQueries - 1) / Plan::kQueries;
    first_column = static_cast<int>(team.index % chunks) * Plan::kColumns;
    start = static_cast<int>(team.index / chunks % tiles) * Plan::kQueries;
    sample = team.index / chunks / tiles;
  }

  VITKERNELS_DEVICE char* at(int place) const { return team.shared + place; }
  // Warps share out queries, and within these keys for the maps, heads for the product with v.
  VITKERNELS_DEVICE static int row_group(int warp) { return warp % Plan::kRowGroups; }
  VITKERNELS_DEVICE static int share(int warp) { return warp / Plan::kRowGroups; }
  VITKERNELS_DEVICE bool idle(int warp) const { return start + 16 * row_group(warp) >= a.tokens; }

  VITKERNELS_DEVICE void run() {
    const int exponent = map_exponent(a.tokens);
    const double map_scale = static_cast<double>(1 << exponent);
    const float centre = static_cast<float>(map_scale / a.tokens);
    team.phase([&](int warp) {
      copy_rows<Plan::kSteps, Plan::kQueries>(team, warp, at(0), Plan::kRow, a.q, sample, 0, a.heads, start, a.tokens, 0);
      copy_rows<Plan::kSteps, kKeys>(team, warp, at(places.k), Plan::kRow, a.k, sample, 0, a.heads, 0, a.tokens, 0);
      team.each(warp, Plan::kHeads * Plan::kQueries, [&](int i) {
        // The two rows that a lane has a part of, r and r + 8, side by side.
        const int h = i / Plan::kQueries, within = i % 16, row = start + i % Plan::kQueries / 16 * 16 + within / 2 + within % 2 * 8;
        const bool there = h < a.heads && row < a.tokens;
        const double lse = there ? a.lse[(sample * a.heads + h) * a.tokens + row] : 0;
        reinterpret_cast<float*>(at(places.lse))[i] = there ? static_cast<float>(lse * kLog2E - exponent) : INFINITY;
      });
      team.each(warp, kMaxHeads, [&](int g) {
        Float16* mix = reinterpret_cast<Float16*>(at(places.mix)) + g * kMaxHeads;
        const Vectors vectors(at(places.vectors));
        if (g < a.heads) return fold_row(a.small, a.heads, g, map_scale, centre / map_scale, mix, vectors);
        for (int h = 0; h < kMaxHeads; ++h) mix[h] = mix[kMaxHeads * kMaxHeads + h] = Float16{0};
        vectors.factor[g] = vectors.constant[g] = vectors.weight[g] = vectors.bias[g] = 0;
      });
      each_lane([&](int, int slot) {
        VITKERNELS_UNROLL
        for (int j = 0; j < kHeadsOfWarp; ++j) {
          VITKERNELS_UNROLL
          for (int n = 0; n < 2 * Plan::kSteps; ++n) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 4; ++e) acc[team.place_of(warp)][j][n][slot][e] = 0;
          }
        }
      });
    });
    for (int n = 0; n < a.tokens; n += kKeys) {
      team.phase([&](int warp) {
        copy_rows<Plan::kSteps, kKeys>(team, warp, at(places.v), Plan::kRow, a.v, sample, 0, a.heads, n, a.tokens, first_column);
        if (!idle(warp)) map(warp, n, centre);
      });
      team.phase([&](int warp) {
        if (n + kKeys < a.tokens) {
          copy_rows<Plan::kSteps, kKeys>(team, warp, at(places.k), Plan::kRow, a.k, sample, 0, a.heads, n + kKeys, a.tokens, 0);
        }
        if (!idle(warp)) apply(warp);
      });
    }
    team.phase([&](int warp) {
      if (!idle(warp)) store(warp);
    });
  }

  // The mixed and normed maps of 16 queries and 8 keys.
  VITKERNELS_DEVICE void map(int warp, int n, float centre) {
    const char* q = at(16 * row_group(warp) * Plan::kRow);
    const char* k = at(places.k + 8 * share(warp) * Plan::kRow);
    const float* lse = reinterpret_cast<const float*>(at(places.lse)) + 16 * row_group(warp);
    const int first_key = n + 8 * share(warp);
    const bool ragged = first_key + 8 > a.tokens;
    Lanes<uint32_t, 2 * Plan::kHeads> x;  // heads 2j and 2j + 1 of element e: register 4j + e
    VITKERNELS_UNROLL
    for (int j = 0; j < Plan::kHeads / 2; ++j) {
      Lanes<float, 4> s[2];
      VITKERNELS_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int h = 2 * j + u < a.heads ? 2 * j + u : a.heads - 1;  // one that is not there has zeros in the mix
        products<T, Plan::kSteps>(s[u], q + h * Plan::kQueries * Plan::kRow, k + h * kKeys * Plan::kRow, Plan::kRow);
      }
      each_lane([&](int lane, int slot) {
        float p[2][4];
        VITKERNELS_UNROLL
        for (int u = 0; u < 2; ++u) {
          const Pair<float> shift = load_pair(lse + (2 * j + u) * Plan::kQueries + lane / 4 * 2);
          VITKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) {
            p[u][e] = exp2_fast(fmaf(s[u][slot][e], a.scale_log2, -(e < 2 ? shift.first : shift.second))) - centre;
            if (ragged && first_key + lane % 4 * 2 + (e & 1) >= a.tokens) p[u][e] = 0;  // v is zero there, and this only has to be finite
          }
        }
        VITKERNELS_UNROLL
        for (int e = 0; e < 4; ++e) x[slot][4 * j + e] = packed<Float16>(p[0][e], p[1][e]);
      });
    }
    Lanes<uint32_t, 4> mix, rest;  // of columns 8 i + ..., registers 2 i and 2 i + 1
    Lanes<float, 2> factor[kTiles], constant[kTiles], weight[kTiles], bias[kTiles];
    const Vectors vectors(at(places.vectors));
    each_lane([&](int lane, int slot) {
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(at(places.mix));
      VITKERNELS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int place = (8 * (i / 2) + lane / 4) * (kMaxHeads / 2) + 4 * (i % 2) + lane % 4;
        mix[slot][i] = pairs[place], rest[slot][i] = pairs[kMaxHeads * kMaxHeads / 2 + place];
      }
      VITKERNELS_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        VITKERNELS_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int g = 8 * i + lane % 4 * 2 + e;
          factor[i][slot][e] = vectors.factor[g], constant[i][slot][e] = vectors.constant[g];
          weight[i][slot][e] = vectors.weight[g], bias[i][slot][e] = vectors.bias[g];
        }
      }
    });
    char* exchange = at(places.exchange + warp * Plan::kExchange);
    char* maps = at(places.maps + 16 * row_group(warp) * Plan::kMapRow + 16 * share(warp));
    const bool layer = a.small.norm == Norm::kLayer;
    const float per_head = 1.0f / static_cast<float>(a.heads), eps = static_cast<float>(a.small.eps);
    VITKERNELS_UNROLL
    for (int half = 0; half < 2; ++half) {  // queries 0 to 7 and 8 to 15
      // An element's row of heads, in two parts of 16 bytes. Rows of the even keys of a query come first, then those of the odd ones; and of every
      // other query the two parts change places, so that what is written and what is read at once lies in different banks.
      const auto place = [&](int query, int key, int part) { return exchange + query * 256 + key % 2 * 128 + key / 2 * 32 + (part ^ (query & 1)) * 16; };
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
      VITKERNELS_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        // Two queries x 8 keys. Row i of the product is query i / 4 and key 2 (i % 4), row i + 8 the key after it: a lane then has neighbours.
        Lanes<uint32_t, 4> elements;
        load_matrices<false>(elements, [&](int lane) {
          return place(2 * pair + lane % 8 / 4, lane % 4 * 2 + lane / 8 % 2, kTiles > 1 ? lane / 16 : 0);
        });
        Lanes<float, 4> z[kTiles];
        Lanes<float, 2> squares;
        VITKERNELS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
          each_lane([&](int, int slot) {
            for (int e = 0; e < 4; ++e) z[i][slot][e] = 0;
          });
          mma<Float16>(z[i], elements, mix, 2 * i);
          if constexpr (std::is_same_v<T, Float16>) mma<Float16>(z[i], elements, rest, 2 * i);
        }
        each_lane([&](int, int slot) {
          squares[slot][0] = squares[slot][1] = 0;
          VITKERNELS_UNROLL
          for (int i = 0; i < kTiles; ++i) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 4; ++e) {
              float& value = z[i][slot][e];
              value = fmaf(value, factor[i][slot][e & 1], constant[i][slot][e & 1]);
              squares[slot][e / 2] = fmaf(value, value, squares[slot][e / 2]);
            }
          }
        });
        if (layer) {
          row_sum(squares);
          each_lane([&](int, int slot) {
            VITKERNELS_UNROLL
            for (int r = 0; r < 2; ++r) {
              const float inverse = inverse_root(fmaf(squares[slot][r], per_head, eps));
              VITKERNELS_UNROLL
              for (int i = 0; i < kTiles; ++i) {
                VITKERNELS_UNROLL
                for (int e = 0; e < 2; ++e) {
                  float& value = z[i][slot][2 * r + e];
                  value = fmaf(value * inverse, weight[i][slot][e], bias[i][slot][e]);
                }
              }
            }
          });
        }
        each_lane([&](int lane, int slot) {
          const int row = 8 * half + 2 * pair + lane / 16, key = lane / 4 % 4 * 2;
          VITKERNELS_UNROLL
          for (int i = 0; i < kTiles; ++i) {
            VITKERNELS_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int g = 8 * i + lane % 4 * 2 + e;
              if (g >= a.heads) continue;
              *reinterpret_cast<uint32_t*>(maps + g * Plan::kMapHead + row * Plan::kMapRow + 2 * key) = packed<T>(z[i][slot][e], z[i][slot][2 + e]);
            }
          }
        });
      }
      warp_barrier();
    }
  }

  // Of a fourth of the heads: the maps of 16 queries and 32 keys times the keys' values.
  VITKERNELS_DEVICE void apply(int warp) {
    VITKERNELS_UNROLL
    for (int j = 0; j < kHeadsOfWarp; ++j) {
      const int h = share(warp) + kKeyGroups * j;
      if (h >= a.heads) continue;
      const char* maps = at(places.maps + h * Plan::kMapHead + 16 * row_group(warp) * Plan::kMapRow);
      const char* v = at(places.v + h * kKeys * Plan::kRow);
      VITKERNELS_UNROLL
      for (int k = 0; k < kKeys; k += 16) {
        Lanes<uint32_t, 4> left;
        load_matrices<false>(left, [&](int lane) { return maps + lane % 16 * Plan::kMapRow + 2 * k + lane / 16 * 16; });
        VITKERNELS_UNROLL
        for (int c = 0; c < Plan::kSteps; ++c) {
          Lanes<uint32_t, 4> right;
          load_matrices<true>(right, [&](int lane) { return v + (k + lane % 16) * Plan::kRow + 32 * c + lane / 16 * 16; });
          VITKERNELS_UNROLL
          for (int i = 0; i < 2; ++i) mma<T>(acc[team.place_of(warp)][j][2 * c + i], left, right, 2 * i);
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
            const float* value = &acc[team.place_of(warp)][j][n][slot][2 * r];
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
