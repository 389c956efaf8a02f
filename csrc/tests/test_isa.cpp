// The choice of the instruction set: what is detected, and what VITKERNELS_CPU_ISA makes of it.
#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "common/isa.h"

using namespace vitkernels::isa;

namespace {

void names_are_distinct() {
  for (const Isa a : kAll) {
    for (const Isa b : kAll) CHECK((std::strcmp(name(a), name(b)) == 0) == (a == b), "%s, %s", name(a), name(b));
  }
}

void detected_is_the_best_that_runs() {
  CHECK(built(Isa::kBaseline) && cpu_can_run(Isa::kBaseline), "the baseline must always be there");
  CHECK(built(detected()) && cpu_can_run(detected()), "%s", name(detected()));
  for (const Isa isa : kAll) {
    if (isa <= detected() || !built(isa) || !cpu_can_run(isa)) continue;
    CHECK(isa == Isa::kAvx512Bf16 && !fast_bf16_dot(), "%s runs here and was passed by", name(isa));
  }
  // An instruction set contains those below it.
  for (std::size_t i = 1; i < kAll.size(); ++i) CHECK(!cpu_can_run(kAll[i]) || cpu_can_run(kAll[i - 1]), "%s", name(kAll[i]));
}

void features_agree_with_the_choice() {
  bool every_avx512 = true, bf16 = false;
  for (const Feature& feature : features()) {
    if (std::strcmp(feature.name, "avx512_bf16") == 0) {
      bf16 = feature.present;
    } else {
      every_avx512 = every_avx512 && feature.present;
    }
  }
  CHECK(every_avx512 == cpu_can_run(Isa::kAvx512), "features() and cpu_can_run(avx512) disagree");
  CHECK((every_avx512 && bf16) == cpu_can_run(Isa::kAvx512Bf16), "features() and cpu_can_run(avx512_bf16) disagree");
}

void a_value_is_honoured_or_explained() {
  for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
    const Selection chosen = select(unset);
    CHECK(chosen.isa == detected() && chosen.error[0] == '\0', "%s", chosen.error);
  }
  for (const Isa isa : kAll) {
    const Selection chosen = select(name(isa));
    if (built(isa) && cpu_can_run(isa)) {
      CHECK(chosen.isa == isa && chosen.error[0] == '\0', "%s: %s", name(isa), chosen.error);
    } else {
      CHECK(chosen.isa == detected() && std::strstr(chosen.error, name(isa)) != nullptr, "%s: '%s'", name(isa), chosen.error);
    }
  }
  for (const char* wrong : {"avx", "AVX2", " avx2", "avx2 ", "native", "avx512_bf16x"}) {
    const Selection chosen = select(wrong);
    CHECK(chosen.isa == detected(), "%s", wrong);
    CHECK(std::strstr(chosen.error, wrong) != nullptr && std::strstr(chosen.error, "baseline") != nullptr, "'%s'", chosen.error);
  }
  const std::string endless(100000, 'x');
  CHECK(std::strlen(select(endless.c_str()).error) < sizeof(Selection::error), "the message must end");
}

void the_variable_is_read_once() {
  ::setenv("VITKERNELS_CPU_ISA", "baseline", 1);
  CHECK(selected() == Isa::kBaseline, "%s", name(selected()));
  ::setenv("VITKERNELS_CPU_ISA", "nonsense", 1);
  CHECK(selected() == Isa::kBaseline && selection_error() == nullptr, "a later change of the variable must not matter");
}

}  // namespace

int main() {
  names_are_distinct();
  detected_is_the_best_that_runs();
  features_agree_with_the_choice();
  a_value_is_honoured_or_explained();
  the_variable_is_read_once();
  return vitkernels::test::finish();
}
