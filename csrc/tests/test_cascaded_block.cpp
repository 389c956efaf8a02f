// The CUDA kernels' own code, forward and backward, run on the CPU: 32 lanes and 8 warps in loops, tensor cores emulated
// (csrc/cascaded_group/cuda_warp.h).
//
// Results are held to the contract's rule (tests/contract/oracle.py): the error against float64 is at most twice that of the same mathematics done
// step by step in the element type, plus two units in the last place of the largest value. Memory starts as NaN, every result must be written, and a
// phase must give the same bits in whatever order its warps run, which a missing barrier would not.
#include <algorithm>

#include "cascaded_block.h"

namespace vitkernels::test {
namespace {

constexpr std::array<int, kWarps> kForwards = {0, 1, 2, 3, 4, 5, 6, 7}, kBackwards = {7, 6, 5, 4, 3, 2, 1, 0}, kMixed = {3, 0, 6, 5, 1, 7, 2, 4};

template <class T>
constexpr double kEpsilon = std::is_same_v<T, float>      ? 0x1p-23
                            : std::is_same_v<T, BFloat16> ? 0x1p-7
                                                          : 0x1p-10;

double largest_error(const std::vector<double>& values, const std::vector<double>& exact) {
  double largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double error = std::fabs(values[i] - exact[i]);
    if (std::isnan(error)) return error;
    largest = std::fmax(largest, error);
  }
  return largest;
}

bool same_bits(const Results& a, const Results& b) {
  const auto left = named(a), right = named(b);
  for (size_t i = 0; i < left.size(); ++i) {
    if (std::memcmp(left[i].second->data(), right[i].second->data(), left[i].second->size() * sizeof(double)) != 0) return false;
  }
  return true;
}

template <class T>
void check(const Case& c, const char* dtype, int64_t limit = kSharedLimitSm80, int64_t blocks = 2) {
  const Shape s = c.shape();
  const double scale = 1 / std::sqrt(s.key_dim);
  blocks = std::min(blocks, s.windows());
  const Values values = random_values<T>(c, static_cast<unsigned long long>(s.channels() * 100 + s.tokens()));
  const Results exact = defined<double, double>(c, values, scale), eager = defined<T, float>(c, values, scale);
  const Results fast = emulated<T>(c, values, scale, limit, blocks, kForwards);
  // Without biases the heads' outputs come close to zero, where ReLU's gradient jumps and 16 bits cannot say on which side they are.
  const bool gradients = c.biases || std::is_same_v<T, float>;
  CHECK(!c.biases || exact.smallest_output > 0.1, "an output is %g: gradients would be compared across ReLU's jump", exact.smallest_output);
  for (size_t i = 0; i < (gradients ? named(fast).size() : 1); ++i) {
    const auto [name, want] = named(exact)[i];
    double largest = 0;
    for (const double value : *want) largest = std::fmax(largest, std::fabs(value));
    const double error = largest_error(*named(fast)[i].second, *want), of_eager = largest_error(*named(eager)[i].second, *want);
    CHECK(
        error <= 2 * of_eager + 2 * kEpsilon<T> * largest,
        "%s of %s, C=%d heads=%d d=%d key_dim=%d w=%d %dx%d: error %.3g, eager's %.3g, largest value %.3g", name, dtype, s.channels(), s.heads,
        s.value_dim, s.key_dim, s.window, s.height, s.width, error, of_eager, largest);
  }
  for (const auto& order : {kBackwards, kMixed}) {
    CHECK(
        same_bits(fast, emulated<T>(c, values, scale, limit, blocks, order)), "%s w=%d C=%d: another order of the warps, other bits", dtype, s.window,
        s.channels());
  }
}

void check_all(const Case& c, int64_t limit = kSharedLimitSm80, int64_t blocks = 2) {
  check<float>(c, "float32", limit, blocks);
  check<BFloat16>(c, "bfloat16", limit, blocks);
  check<Float16>(c, "float16", limit, blocks);
}

void run() {
  // EfficientViT's stages: 7 x 7 and 4 x 4 windows, kernels of 7 to 3.
  check_all({1, 14, 14, 4, 16, 16, 16, 7, {5, 5, 5, 5}});
  check_all({1, 7, 7, 4, 32, 32, 16, 7, {7, 5, 3, 3}, true});
  check_all({2, 4, 4, 2, 112, 112, 16, 4, {7, 5}});
  // A map that the window does not divide, no biases, channels_last.
  check_all({1, 9, 8, 2, 16, 16, 16, 7, {5, 3}, false, false});
  check_all({2, 5, 6, 3, 32, 32, 16, 4, {7, 5, 3}, true});
  // One head with a value dim of its own; dims that are no multiples of 16, odd ones; kernels far larger than the window; one token.
  check_all({1, 6, 11, 1, 5, 7, 5, 6, {3}});
  check_all({1, 6, 6, 1, 40, 24, 20, 6, {5}, true});
  check_all({2, 5, 5, 2, 33, 33, 33, 3, {9, 1}});
  check_all({3, 2, 3, 3, 2, 2, 5, 1, {3, 1, 5}});
  check_all({1, 1, 1, 1, 1, 1, 1, 1, {1}});
  // Windows of up to 14 x 14, and one for which shared memory has no room: everything in the workspace.
  check_all({1, 14, 14, 2, 16, 16, 16, 14, {5, 3}});
  check_all({1, 10, 11, 2, 8, 8, 8, 10, {5, 3}});
  check_all({1, 8, 8, 2, 16, 16, 16, 8, {3, 3}, true});
  check_all({1, 7, 7, 2, 16, 16, 16, 7, {3, 5}}, 0, 1);
  // More blocks than windows; one block for all of them.
  check_all({3, 4, 4, 2, 16, 16, 16, 4, {5, 3}}, kSharedLimitSm80, 1);
  check<BFloat16>({1, 4, 4, 2, 16, 16, 16, 4, {5, 3}}, "bfloat16", kSharedLimitSm80, 1);
}

}  // namespace
}  // namespace vitkernels::test

int main() {
  vitkernels::test::run();
  return vitkernels::test::finish();
}
