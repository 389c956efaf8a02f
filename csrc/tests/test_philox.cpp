// Philox4x32-10 against the known answers that Random123, the library of its authors, publishes.
#include "common/philox.h"

#include "per_isa.h"

namespace vitkernels::test {
namespace {

using namespace vitkernels::VITKERNELS_ISA;

struct Known {
  uint32_t counter[4], key[2], words[4];
};

constexpr Known kKnown[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

void every_lane_gives_the_known_answers() {
  for (const Known& known : kKnown) {
    PhiloxWords words;
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < kPhiloxLanes; ++i) words[w][i] = known.counter[w];
    }
    philox(known.key[0] | static_cast<uint64_t>(known.key[1]) << 32, words);
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < kPhiloxLanes; ++i) CHECK(words[w][i] == known.words[w], "word %d of lane %d is %08x", w, i, words[w][i]);
    }
  }
}

}  // namespace
}  // namespace vitkernels::test

int main(int, char** arguments) {
  using namespace vitkernels::test;
  if (!can_run(arguments[1])) return kSkipped;
  every_lane_gives_the_known_answers();
  return finish();
}
