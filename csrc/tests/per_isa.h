// For tests that are compiled once per instruction set: they must not start on a CPU that cannot run theirs.
#pragma once

#include <cstring>

#include "check.h"
#include "common/isa.h"

namespace vitkernels::test {

constexpr int kSkipped = 77;  // ctest's SKIP_RETURN_CODE in CMakeLists.txt

// True if this CPU can run the instruction set of that name.
inline bool can_run(const char* isa_name) {
  for (const isa::Isa each : isa::kAll) {
    if (std::strcmp(isa_name, isa::name(each)) == 0) return isa::cpu_can_run(each);
  }
  return false;
}

}  // namespace vitkernels::test
