// Random numbers that are a function of a place and a seed, as dropout masks are drawn: nothing is stored, and every backend finds the same ones.
#pragma once

#include <cstdint>

#ifndef VITKERNELS_ISA
#error "define VITKERNELS_ISA to the name of the instruction set"
#endif

namespace vitkernels {
namespace VITKERNELS_ISA {

constexpr int kPhiloxLanes = 16;
using PhiloxWords = uint32_t[4][kPhiloxLanes];

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, section 3.3): words holds counters and becomes their random words.
inline void philox(uint64_t key, PhiloxWords& words) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t a = static_cast<uint64_t>(words[0][i]) * 0xD2511F53u, b = static_cast<uint64_t>(words[2][i]) * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ key0;
      words[1][i] = static_cast<uint32_t>(b);
      words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ key1;
      words[3][i] = static_cast<uint32_t>(a);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels
