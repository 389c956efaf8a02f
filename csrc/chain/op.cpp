// The chain's entry point: its program read and checked against the weights, the output allocated, the kernel table of this CPU called.
#include "chain/op.h"

#include "chain/kernels.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

using namespace chain;

const chain::Kernels& kernels() {
  static const chain::Kernels& table = []() -> const chain::Kernels& { VITKERNELS_SELECT_KERNELS(chain_kernels) }();
  return table;
}

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
int64_t aligned(int64_t count) { return round_up(count, kAlign); }

// Reads a program, layer by layer. Python has made it of checked modules: the checks here guard direct callers of torch.ops from reading out of bounds.
class Reader {
 public:
  // With `pairs` depths are even.
  Reader(const std::vector<int64_t>& program, const Tensor& x, bool pairs)
      : program_(program), step_(pairs ? 2 : 1), channels_(x.size(1)), height_(x.size(2)), width_(x.size(3)) {
    while (at_ < program_.size()) layers_.push_back(layer());
  }

  const std::vector<Layer>& layers() const { return layers_; }
  int64_t matrices() const { return matrices_; }
  int64_t vectors() const { return vectors_; }

 private:
  int64_t next(int64_t least) {
    STD_TORCH_CHECK(at_ < program_.size(), "vitkernels::layer_chain: the program ends within a layer");
    const int64_t value = program_[at_++];
    STD_TORCH_CHECK(value >= least && value < (int64_t{1} << 31), "vitkernels::layer_chain: the program holds ", value, " where at least ", least, " is needed");
    return value;
  }
  int64_t matrix(int64_t depth, int64_t columns) {
    const int64_t size = round_up(depth, step_) * round_up(columns, kPanel);
    return matrices_ += size, matrices_ - size;
  }
  int64_t vector(int64_t count) { return vectors_ += aligned(count), vectors_ - aligned(count); }

  Layer layer() {
    Layer l{};
    const int64_t kind = next(0);
    STD_TORCH_CHECK(kind < static_cast<int64_t>(Kind::kImage), "vitkernels::layer_chain: the program names no kind of layer with ", kind);
    l.kind = static_cast<Kind>(kind);
    l.residual = next(0) != 0;
    l.channels = l.out_channels = channels_, l.height = l.out_height = height_, l.width = l.out_width = width_;
    l.row = aligned(channels_);
    switch (l.kind) {
      case Kind::kConvolution:
        l.out_channels = next(1);
        sliding(l);
        if (layers_.empty() && channels_ < kAlign && !l.residual) {
          l.kind = Kind::kImage, l.row = 0;  // there is no map of it
          l.vectors[1] = vector(l.out_channels * channels_ * l.kernel * l.kernel);
        } else {
          l.matrices[0] = matrix(l.kernel * l.kernel * channels_, l.out_channels);
        }
        l.vectors[0] = vector(l.out_channels);
        break;
      case Kind::kDepthwise:
        sliding(l);
        l.vectors[0] = vector(l.kernel * l.kernel * l.row);
        l.vectors[1] = vector(channels_);
        break;
      case Kind::kFeedForward:
      case Kind::kSqueezeExcite:
        l.hidden = next(1);
        l.matrices[0] = matrix(channels_, l.hidden), l.matrices[1] = matrix(l.hidden, channels_);
        l.vectors[0] = vector(l.hidden), l.vectors[1] = vector(channels_);
        break;
      case Kind::kPool:
        l.out_height = l.out_width = 1;
        l.vectors[0] = vector(channels_), l.vectors[1] = vector(channels_);
        break;
      case Kind::kAttention:
        attention(l);
        break;
      case Kind::kImage:;  // not in programs
    }
    l.out_row = aligned(l.out_channels);
    STD_TORCH_CHECK(
        !l.residual || (l.out_channels == channels_ && l.out_height == height_ && l.out_width == width_),
        "vitkernels::layer_chain: a layer with a residual must keep the shape of its input");
    channels_ = l.out_channels, height_ = l.out_height, width_ = l.out_width;
    return l;
  }

  void sliding(Layer& l) {
    l.kernel = next(1), l.stride = next(1), l.padding = next(0), l.relu = next(0) != 0;
    const auto slid = [&](int64_t size) { return size + 2 * l.padding < l.kernel ? 0 : (size + 2 * l.padding - l.kernel) / l.stride + 1; };
    l.out_height = slid(height_), l.out_width = slid(width_);
    STD_TORCH_CHECK(l.out_height > 0 && l.out_width > 0, "vitkernels::layer_chain: a map of ", height_, " x ", width_, " is too small for a kernel of ", l.kernel);
  }

  void attention(Layer& l) {
    l.heads = next(1), l.key_dim = next(1), l.value_dim = next(1), l.window = next(1);
    l.kernel_sizes = program_.data() + at_;
    int64_t taps = 0;
    for (int64_t head = 0; head < l.heads; ++head) {
      const int64_t side = next(1);
      STD_TORCH_CHECK(side % 2 == 1, "vitkernels::layer_chain: a kernel of an attention must be odd");
      taps += side * side;
    }
    STD_TORCH_CHECK(channels_ % l.heads == 0 && (l.heads == 1 || l.value_dim == channels_ / l.heads), "vitkernels::layer_chain: the heads must divide the channels");
    STD_TORCH_CHECK(l.window <= height_ && l.window <= width_, "vitkernels::layer_chain: a map of ", height_, " x ", width_, " is smaller than the window of ", l.window);
    const int64_t rows = 2 * l.key_dim + l.value_dim;
    const int64_t sizes[] = {channels_ * rows,         l.heads * rows, l.key_dim * taps, l.heads * l.key_dim, l.heads * l.window * l.window,
                             l.heads * l.value_dim * channels_, channels_};
    for (int64_t i = 0; i < 7; ++i) l.vectors[i] = vector(sizes[i]);
  }

  const std::vector<int64_t>& program_;
  size_t at_ = 0;
  const int64_t step_;
  int64_t channels_, height_, width_, matrices_ = 0, vectors_ = 0;
  std::vector<Layer> layers_;
};

}  // namespace

Tensor layer_chain(const Tensor& x, const Tensor& matrices, const Tensor& vectors, std::vector<int64_t> program) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "vitkernels::layer_chain: x must be [B, C, H, W], not empty but for B");
  STD_TORCH_CHECK(!program.empty(), "vitkernels::layer_chain: the program is empty");
  const bool pairs = x.scalar_type() == ScalarType::BFloat16 && matrices.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(!pairs || kernels().pairs, "vitkernels::layer_chain: matrices of pairs need bfloat16 products (avx512_bf16)");
  if (!pairs) check_same(matrices, x, "matrices");
  const Reader reader(program, x, pairs);
  STD_TORCH_CHECK(vectors.scalar_type() == accumulation_type(x), "vitkernels::layer_chain: vectors must be in the accumulation type");
  STD_TORCH_CHECK(
      matrices.is_contiguous() && matrices.numel() * (pairs ? 2 : 1) == reader.matrices() && vectors.is_contiguous() && vectors.numel() == reader.vectors(),
      "vitkernels::layer_chain: the program needs contiguous matrices of ", reader.matrices(), " elements and vectors of ", reader.vectors());
  const std::vector<Layer>& layers = reader.layers();
  const int64_t batch = x.size(0), channels = layers.back().out_channels, height = layers.back().out_height, width = layers.back().out_width;
  const bool channels_last = x.stride(1) == 1 && !x.is_contiguous();
  Tensor y = empty_map(batch, channels, height, width, channels_last, x.scalar_type());
  kernels().run({dtype_of(x), batch, map_of(x), map_of(y), matrices.data_ptr(), vectors.data_ptr(), pairs, layers.data(), static_cast<int64_t>(layers.size())});
  return y;
}

}  // namespace vitkernels
