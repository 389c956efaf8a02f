// The whole test framework: CHECK counts failures and says where, finish() turns them into an exit status.
#pragma once

#include <cstdio>

namespace vitkernels::test {

inline int failures = 0;
inline int checks = 0;
constexpr int kShown = 20;

#define CHECK(condition, ...)                                                             \
  do {                                                                                    \
    ++vitkernels::test::checks;                                                           \
    if (!(condition) && ++vitkernels::test::failures <= vitkernels::test::kShown) {       \
      std::fprintf(stderr, "%s:%d: %s is false: ", __FILE__, __LINE__, #condition);       \
      std::fprintf(stderr, __VA_ARGS__);                                                  \
      std::fprintf(stderr, "\n");                                                         \
    }                                                                                     \
  } while (false)

inline int finish() {
  if (checks == 0) {
    std::fprintf(stderr, "no check was made\n");
    return 1;
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

// Uniform in [-1, 1), the same on every machine.
class Random {
 public:
  explicit Random(unsigned long long seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  double next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<double>(state_ >> 11) * 0x1p-52 - 1.0;
  }

 private:
  unsigned long long state_;
};

}  // namespace vitkernels::test
