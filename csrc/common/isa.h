// Which instruction set the CPU kernels run with: found once at run time, so that one binary serves every CPU of its architecture.
#pragma once

#include <array>

namespace vitkernels::isa {

// From the least to the most capable; comparisons rely on the order.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline constexpr std::array<Isa, 4> kAll = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// The name used in build.json, in object names and in VITKERNELS_CPU_ISA: "baseline", "avx2", "avx512", "avx512_bf16".
const char* name(Isa isa);

// True if this binary holds kernels for `isa` (the compiler knew its flags).
bool built(Isa isa);

// True if this CPU and its operating system can execute `isa`.
bool cpu_can_run(Isa isa);

// True if the CPU multiplies bf16 pairs (vdpbf16ps) at full rate: AMD's Zen 4 and later. Intel's cores issue it at half rate, where
// upcasting to fp32 in registers is as fast and more accurate.
bool fast_bf16_dot();

// The best ISA that is built and that this CPU runs at full speed.
Isa detected();

// detected(), or what VITKERNELS_CPU_ISA names. The variable is read once, on the first call. A value that is unknown, not built or
// not supported by this CPU leaves detected() in force and selection_error() says so.
Isa selected();

// Why VITKERNELS_CPU_ISA could not be honoured; nullptr if it was, or if it is not set. The text lives as long as the process.
const char* selection_error();

// The features behind the choice, by the names the Linux kernel uses for them.
struct Feature {
  const char* name;
  bool present;
};
inline constexpr int kFeatureCount = 8;
std::array<Feature, kFeatureCount> features();

// The choice for one value of the variable (nullptr: not set): selected() and selection_error() without the process-wide memory.
struct Selection {
  Isa isa;
  char error[320];  // empty if the value was honoured
};
Selection select(const char* requested);

}  // namespace vitkernels::isa
