#include "common/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace vitkernels::isa {
namespace {

constexpr const char* kVariable = "VITKERNELS_CPU_ISA";

#if defined(__x86_64__)
// A macro because __builtin_cpu_supports takes a string literal only. It looks at the operating system's XSAVE state too, so a
// feature that the kernel has switched off counts as absent.
#define VITKERNELS_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define VITKERNELS_CPU_HAS(feature) false
#endif

bool cpu_has_f16c() {
#if defined(__x86_64__)
  // Not every compiler's __builtin_cpu_supports knows "f16c". CPUID leaf 1, ECX bit 29; every CPU with AVX2 has it.
  unsigned eax = 1, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (ecx >> 29 & 1U) != 0;
#else
  return false;
#endif
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}

// Calls `visit(isa)` for the usable ISAs, writing their names to `text`, separated by ", ".
void list_usable(char* text, std::size_t size) {
  text[0] = '\0';
  for (const Isa isa : kAll) {
    if (built(isa) && cpu_can_run(isa)) {
      const std::size_t used = std::strlen(text);
      std::snprintf(text + used, size - used, "%s%s", used == 0 ? "" : ", ", name(isa));
    }
  }
}

const Selection& selection() {
  static const Selection chosen = select(std::getenv(kVariable));
  return chosen;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

bool built(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
#if defined(VITKERNELS_HAVE_AVX2)
      return true;
#else
      return false;
#endif
    case Isa::kAvx512:
#if defined(VITKERNELS_HAVE_AVX512)
      return true;
#else
      return false;
#endif
    case Isa::kAvx512Bf16:
#if defined(VITKERNELS_HAVE_AVX512_BF16)
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool cpu_can_run(Isa isa) {
  const bool avx2 = VITKERNELS_CPU_HAS("avx2") && VITKERNELS_CPU_HAS("fma") && cpu_has_f16c();
  const bool avx512 = avx2 && VITKERNELS_CPU_HAS("avx512f") && VITKERNELS_CPU_HAS("avx512bw") && VITKERNELS_CPU_HAS("avx512dq") &&
                      VITKERNELS_CPU_HAS("avx512vl");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && cpu_has_avx512_bf16();
  }
  return false;
}

// The first AMD cores with AVX-512 BF16 are Zen 4, and all of them issue vdpbf16ps at full rate.
bool fast_bf16_dot() { return is_amd() && cpu_has_avx512_bf16(); }

Isa detected() {
  Isa best = Isa::kBaseline;
  for (const Isa isa : kAll) {
    if (isa == Isa::kAvx512Bf16 && !fast_bf16_dot()) continue;
    if (built(isa) && cpu_can_run(isa)) best = isa;
  }
  return best;
}

Selection select(const char* requested) {
  Selection chosen{detected(), ""};
  if (requested == nullptr || requested[0] == '\0') return chosen;
  char usable[128];
  list_usable(usable, sizeof(usable));
  for (const Isa isa : kAll) {
    if (std::strcmp(requested, name(isa)) != 0) continue;
    if (built(isa) && cpu_can_run(isa)) {
      chosen.isa = isa;
    } else {
      std::snprintf(chosen.error, sizeof(chosen.error), "%s is '%s', which %s; here it can be: %s", kVariable, requested,
                    built(isa) ? "this CPU cannot run" : "this build of the library does not hold", usable);
    }
    return chosen;
  }
  std::snprintf(chosen.error, sizeof(chosen.error), "%s is '%.60s', which names no instruction set; here it can be: %s", kVariable,
                requested, usable);
  return chosen;
}

Isa selected() { return selection().isa; }

const char* selection_error() { return selection().error[0] == '\0' ? nullptr : selection().error; }

std::array<Feature, kFeatureCount> features() {
  return {{{"avx2", VITKERNELS_CPU_HAS("avx2")},
           {"fma", VITKERNELS_CPU_HAS("fma")},
           {"f16c", cpu_has_f16c()},
           {"avx512f", VITKERNELS_CPU_HAS("avx512f")},
           {"avx512bw", VITKERNELS_CPU_HAS("avx512bw")},
           {"avx512dq", VITKERNELS_CPU_HAS("avx512dq")},
           {"avx512vl", VITKERNELS_CPU_HAS("avx512vl")},
           {"avx512_bf16", cpu_has_avx512_bf16()}}};
}

}  // namespace vitkernels::isa
