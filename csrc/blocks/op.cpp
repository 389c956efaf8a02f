// Transformer blocks, one after the other, from kernels that other ops have. Attention apart every token goes its own way: threads meet before and after it only,
// and what lies between, up to the next block's queries, keys and values, each does for its own tokens.
#include "blocks/op.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "bottleneck/kernels.h"
#include "bottleneck/op.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "head_mixing/kernels.h"
#include "head_mixing/op.h"
#include "packed/entry.h"

namespace vitkernels {
namespace {

using bottleneck::kPanel;

int64_t padded(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel; }

int64_t bytes_of(const Tensor& t) {
  const Dtype dtype = dtype_of(t);
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// A packed tensor, handed out piece by piece. Python has packed it for the program: the checks guard direct callers of torch.ops from reading out of bounds.
class Pieces {
 public:
  Pieces(const Tensor& tensor, int64_t bytes, const char* name) : tensor_(tensor), bytes_(bytes), name_(name) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "vitkernels::transformer_blocks: ", name, " must be contiguous");
  }
  const void* next(int64_t count) {
    const int64_t begin = at_;
    at_ += count;
    STD_TORCH_CHECK(at_ <= tensor_.numel(), "vitkernels::transformer_blocks: the program needs more ", name_, " than the ", tensor_.numel(), " that there are");
    return static_cast<const char*>(tensor_.data_ptr()) + begin * bytes_;
  }
  void end() const {
    STD_TORCH_CHECK(at_ == tensor_.numel(), "vitkernels::transformer_blocks: the program needs ", at_, " ", name_, ", and there are ", tensor_.numel());
  }

 private:
  const Tensor& tensor_;
  const int64_t bytes_;
  const char* name_;
  int64_t at_ = 0;
};

// Of an element, of tokens and packed weights.
struct Bytes {
  int64_t tokens, matrices, vectors;
};

struct Scales {
  double logits, in_eps, heads_eps, out_eps, mlp_eps, mix_eps;
};

struct Block {
  int64_t heads, dim, hidden;
  bottleneck::Bottleneck in, out, mlp;
  packed::HeadNorm q_norm, k_norm;  // where heads are normalised
  bool normed, mixed;
  const double *mix, *mix_weight, *mix_bias;
  Scales scales;

  int64_t channels() const { return heads * dim; }
};

// Reads a program, block by block.
class Reader {
 public:
  Reader(const Tensor& x, const Tensor& matrices, const Tensor& vectors, const Tensor& numbers, const std::vector<int64_t>& program)
      : x_(x), matrix_(matrices), program_(program), matrices_(matrices, bytes_of(matrices), "matrices"), vectors_(vectors, bytes_of(vectors), "vectors"),
        numbers_(numbers, sizeof(double), "numbers") {
    while (at_ < program_.size()) blocks_.push_back(block());
    matrices_.end(), vectors_.end(), numbers_.end();
  }

  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  int64_t next(int64_t least, int64_t most) {
    STD_TORCH_CHECK(at_ < program_.size(), "vitkernels::transformer_blocks: the program ends within a block");
    const int64_t value = program_[at_++];
    STD_TORCH_CHECK(value >= least && value <= most, "vitkernels::transformer_blocks: the program holds ", value, " where ", least, " to ", most, " is needed");
    return value;
  }
  const double* doubles(int64_t count) { return static_cast<const double*>(numbers_.next(count)); }

  bottleneck::Bottleneck layer(int64_t in, int64_t out, double eps, bool norm) {
    bottleneck::Bottleneck a{};
    a.dtype = dtype_of(x_), a.batch = a.height = a.out_height = 1;
    a.in = a.hidden = a.x_row = in, a.out = a.y_row = out, a.eps = eps;
    if (norm) a.norm = bottleneck::Norm::kToken, a.norm_weight = vectors_.next(padded(in)), a.norm_bias = vectors_.next(padded(in));
    return a;
  }
  void project(bottleneck::Bottleneck& a) {
    a.pairs = bottleneck::pairs_of(x_, matrix_, a.in, a.hidden);
    a.project_weight = matrices_.next(padded(a.out) * a.hidden), a.project_bias = vectors_.next(padded(a.out));
  }

  Block block() {
    constexpr int64_t kMost = int64_t{1} << 20;
    const int64_t channels = x_.size(1);
    Block b{};
    b.heads = next(1, kMost), b.dim = next(1, kMost), b.hidden = next(1, kMost);
    const int64_t activation = next(0, bottleneck::kLastActivation);
    b.normed = next(0, 1), b.mixed = next(0, 1);
    const bool out_norm = next(0, 1);
    const double* scales = doubles(6);
    b.scales = {scales[0], scales[1], scales[2], scales[3], scales[4], scales[5]};
    b.in = layer(channels, 3 * b.channels(), b.scales.in_eps, true);
    project(b.in);
    if (b.normed) {
      for (packed::HeadNorm* norm : {&b.q_norm, &b.k_norm}) norm->weight = vectors_.next(padded(b.channels())), norm->bias = vectors_.next(padded(b.channels()));
    }
    if (b.mixed) {
      STD_TORCH_CHECK(b.heads <= 64 && !b.normed, "vitkernels::transformer_blocks: of at most 64 heads maps are mixed, and their queries have no norm");
      b.mix = doubles(b.heads * b.heads), b.mix_weight = doubles(b.heads), b.mix_bias = doubles(b.heads);
    }
    b.out = layer(b.channels(), channels, b.scales.out_eps, out_norm);
    project(b.out);
    b.mlp = layer(channels, channels, b.scales.mlp_eps, true);
    b.mlp.hidden = b.hidden, b.mlp.activation = static_cast<bottleneck::Activation>(activation);
    b.mlp.expand_weight = matrices_.next(padded(b.hidden) * channels), b.mlp.expand_bias = vectors_.next(padded(b.hidden));
    project(b.mlp);
    return b;
  }

  const Tensor &x_, &matrix_;
  const std::vector<int64_t>& program_;
  size_t at_ = 0;
  Pieces matrices_, vectors_, numbers_;
  std::vector<Block> blocks_;
};

// Where the sequences are that attend to themselves: all pixels of an image, or those at one position in its patches.
struct Sequences {
  packed::Places places;
  int64_t count, tokens;
  std::vector<int32_t> begins;

  Sequences(const Tensor& x, int64_t patch_height, int64_t patch_width) {
    const bool whole = patch_height == 0;
    STD_TORCH_CHECK(
        whole || (patch_height > 0 && patch_width > 0 && x.size(2) % patch_height == 0 && x.size(3) % patch_width == 0),
        "vitkernels::transformer_blocks: the patch must divide the map");
    places = whole ? packed::Places{false, 1, 1, 0} : packed::Places{false, patch_height, patch_width, x.size(3) / patch_width};
    count = x.size(0) * places.height * places.width, tokens = x.size(2) * x.size(3) / (places.height * places.width);
    begins = packed::even_lengths(count, tokens);
  }
  // Rows of heads of a map in channels_last, `pixel` elements from one pixel to the next.
  Rows rows(const void* data, int64_t pixel, int64_t dim, const Tensor& x) const {
    const int64_t line = x.size(3) * pixel;
    return {const_cast<void*>(data), places.width * pixel, dim, 1, x.size(2) * line, places.height * line, line, pixel};
  }
};

// body(first, count) for every thread's share of `total`, of `least` or more, if there are as many.
template <class Body>
void for_shares(int64_t total, int64_t least, const Body& body) {
  struct Context {
    int64_t total, workers;
    const Body& body;
  } context{total, std::min(num_threads(), std::max<int64_t>(total / least, 1)), body};
  const auto run = [](void* data, int64_t i) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t first = c.total * i / c.workers;
    c.body(first, c.total * (i + 1) / c.workers - first);
  };
  parallel_for(context.workers, run, &context);
}

// Tokens with that many neighbours have the same result whatever the number of threads.
constexpr int64_t kLeastTokens = 3;

// One pass of tokens [first, first + count); x, y and residual are those of all tokens.
void run_pass(bottleneck::Bottleneck a, int64_t first, int64_t count, int64_t bytes, const char* x, char* y, const char* residual = nullptr) {
  a.width = a.out_width = count;
  a.x = x + first * a.x_row * bytes, a.y = y + first * a.y_row * bytes;
  a.residual = residual ? residual + first * a.y_row * bytes : nullptr;
  bottleneck::kernels().forward(a);
}

// The two layers of an MLP, whose hidden tokens are `row` elements apart.
bottleneck::Bottleneck expansion_of(bottleneck::Bottleneck mlp, int64_t row) {
  mlp.out = mlp.hidden, mlp.hidden = mlp.in, mlp.y_row = row;
  mlp.project_weight = std::exchange(mlp.expand_weight, nullptr), mlp.project_bias = std::exchange(mlp.expand_bias, nullptr);
  mlp.out_activation = std::exchange(mlp.activation, bottleneck::Activation::kNone);
  return mlp;
}
bottleneck::Bottleneck reduction_of(bottleneck::Bottleneck mlp, int64_t row) {
  mlp.in = mlp.hidden, mlp.x_row = row;
  mlp.norm = bottleneck::Norm::kNone, mlp.norm_weight = mlp.norm_bias = nullptr;
  mlp.expand_weight = mlp.expand_bias = nullptr, mlp.activation = bottleneck::Activation::kNone;
  return mlp;
}

// The distance of hidden tokens: an odd number of cache lines, or the rows of a tile would fall into few sets of the L1 cache.
int64_t hidden_row(int64_t hidden, int64_t bytes) {
  const int64_t line = 64 / bytes;
  return ((hidden + line - 1) / line | 1) * line;
}

// Whether threads share out the outputs of each layer instead of the tokens. Of few tokens each has few, and would read all of the matrices for these, from beyond
// its own cache; on the other hand threads meet behind every layer then. Hidden tokens are kept as the matrices are.
bool shares_outputs(int64_t tokens, const std::vector<Block>& blocks, int64_t matrices, Bytes bytes) {
  constexpr int64_t kTokens = 32, kRows = 8, kWorth = int64_t{1} << 20;  // a thread's, those of a tile, bytes of a block's matrices
  const auto per = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  int64_t narrowest = matrices;
  for (const Block& b : blocks) narrowest = std::min({narrowest, b.out.out, b.hidden});
  const int64_t threads = num_threads(), tiles = per(tokens, kRows), panels = padded(narrowest) / kPanel;
  return threads > 1 && bytes.tokens == bytes.matrices && tokens <= kTokens * threads && matrices * bytes.matrices >= kWorth * static_cast<int64_t>(blocks.size()) &&
         tiles * per(panels, threads) <= per(tiles, threads) * panels;  // the threads are as evenly loaded
}

// One layer of all tokens, its outputs shared out.
void run_by_outputs(const bottleneck::Bottleneck& a, int64_t tokens, Bytes bytes, const char* x, char* y, const char* residual = nullptr) {
  for_shares(padded(a.out) / kPanel, 1, [&](int64_t panel, int64_t panels) {
    const int64_t first = panel * kPanel;
    bottleneck::Bottleneck own = a;
    own.out = std::min(panels * kPanel, a.out - first);
    own.project_weight = static_cast<const char*>(a.project_weight) + first * a.hidden * bytes.matrices;
    own.project_bias = static_cast<const char*>(a.project_bias) + first * bytes.vectors;
    run_pass(own, 0, tokens, bytes.tokens, x, y + first * bytes.tokens, residual ? residual + first * bytes.tokens : nullptr);
  });
}

void attend(const Block& b, const Tensor& x, const Sequences& sequences, const char* qkv, int64_t bytes, char* out) {
  const int64_t channels = b.channels();
  const auto part = [&](int64_t i) { return qkv + i * channels * bytes; };
  packed::Forward a{};
  a.dtype = dtype_of(x), a.places = sequences.places;
  a.sequences = sequences.count, a.total_q = a.total_k = sequences.count * sequences.tokens;
  a.heads = a.kv_heads = b.heads, a.dim = a.value_dim = b.dim;
  a.cu_q = a.cu_k = sequences.begins.data();
  const auto rows = [&](int64_t i) { return sequences.rows(part(i), 3 * channels, b.dim, x); };
  a.q = rows(0), a.k = rows(1), a.v = rows(2);
  if (b.normed) a.norm = packed::Norm::kLayer, a.norm_eps = b.scales.heads_eps, a.q_norm = b.q_norm, a.k_norm = b.k_norm;
  a.scale = b.scales.logits;
  const packed::Schedule schedule = packed::make_schedule(a.cu_q, a.cu_k, nullptr, a.sequences, a.kv_heads, num_threads(), true);
  a.schedule = &schedule;
  a.out = sequences.rows(out, channels, b.dim, x);
  packed::kernels().forward(a);
}

void attend_mixed(const Block& b, const Tensor& x, const char* qkv, int64_t bytes, char* out) {
  const int64_t channels = b.channels(), tokens = x.size(2) * x.size(3);
  const auto map = [&](int64_t i) { return Map{const_cast<char*>(qkv) + i * channels * bytes, tokens * 3 * channels, b.dim, 3 * channels, 1}; };
  const std::vector<double> zeros(static_cast<size_t>(b.heads));
  head_mixing::Forward a{};
  a.dtype = dtype_of(x);
  a.batch = x.size(0), a.heads = b.heads, a.queries = tokens, a.dim = a.value_dim = b.dim;
  a.q = map(0), a.k = map(1), a.v = map(2);
  a.norm = head_mixing::Norm::kLayer;
  a.mix = b.mix, a.mix_bias = zeros.data(), a.weight = b.mix_weight, a.constant = b.mix_bias;
  a.eps = b.scales.mix_eps, a.scale = b.scales.logits;
  a.out = out;
  head_mixing::kernels().forward(a);
}

}  // namespace

Tensor transformer_blocks(
    const Tensor& x, const Tensor& matrices, const Tensor& vectors, const Tensor& numbers, std::vector<int64_t> program, int64_t patch_height, int64_t patch_width) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(1) > 0 && bottleneck::channels_last(x), "vitkernels::transformer_blocks: x must be [B, C, H, W] in channels_last memory, with channels");
  STD_TORCH_CHECK(
      vectors.scalar_type() == accumulation_type(x) && (matrices.scalar_type() == accumulation_type(x) || matrices.scalar_type() == ScalarType::BFloat16) &&
          numbers.scalar_type() == ScalarType::Double,
      "vitkernels::transformer_blocks: vectors must be of the accumulation dtype, matrices, too, or bfloat16, and numbers float64");
  const Reader reader(x, matrices, vectors, numbers, program);
  const Sequences sequences(x, patch_height, patch_width);
  STD_TORCH_CHECK(!reader.blocks().empty(), "vitkernels::transformer_blocks: the program is empty");
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3), pixels = x.size(0) * height * width;
  const Bytes bytes{bytes_of(x), bytes_of(matrices), bytes_of(vectors)};
  Tensor y = empty_strided({x.size(0), channels, height, width}, {height * width * channels, 1, width * channels, channels}, x.scalar_type());
  int64_t most = 0, most_hidden = 0;
  for (const Block& b : reader.blocks()) {
    STD_TORCH_CHECK(b.in.pairs == b.out.pairs && b.in.pairs == b.mlp.pairs && (b.in.pairs || matrices.scalar_type() == accumulation_type(x)),
                    "vitkernels::transformer_blocks: bfloat16 matrices are for bfloat16 alone");
    STD_TORCH_CHECK(!b.mixed || patch_height == 0, "vitkernels::transformer_blocks: maps are mixed of whole images, not of patches");
    most = std::max(most, b.channels()), most_hidden = std::max(most_hidden, b.hidden);
  }
  if (pixels == 0) return y;
  const bool by_outputs = shares_outputs(pixels, reader.blocks(), matrices.numel(), bytes);
  const int64_t row = hidden_row(most_hidden, bytes.tokens);
  const Buffer<char> qkv(pixels * 3 * most * bytes.tokens), attended(pixels * most * bytes.tokens), hidden(by_outputs ? pixels * row * bytes.tokens : 0);
  const char* from = static_cast<const char*>(x.data_ptr());
  char* const to = static_cast<char*>(y.data_ptr());
  const std::vector<Block>& blocks = reader.blocks();
  for_shares(pixels, kLeastTokens, [&](int64_t first, int64_t count) { run_pass(blocks[0].in, first, count, bytes.tokens, from, qkv); });
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& b = blocks[i];
    if (b.mixed) {
      attend_mixed(b, x, qkv, bytes.tokens, attended);
    } else {
      attend(b, x, sequences, qkv, bytes.tokens, attended);
    }
    if (by_outputs) {
      run_by_outputs(b.out, pixels, bytes, attended, to, from);
      run_by_outputs(expansion_of(b.mlp, row), pixels, bytes, to, hidden);
      run_by_outputs(reduction_of(b.mlp, row), pixels, bytes, hidden, to, to);
      if (i + 1 < blocks.size()) run_by_outputs(blocks[i + 1].in, pixels, bytes, to, qkv);
    } else {
      for_shares(pixels, kLeastTokens, [&](int64_t first, int64_t count) {
        run_pass(b.out, first, count, bytes.tokens, attended, to, from);
        run_pass(b.mlp, first, count, bytes.tokens, to, to, to);  // in place: a token is read before it is written, and by no other
        if (i + 1 < blocks.size()) run_pass(blocks[i + 1].in, first, count, bytes.tokens, to, qkv);
      });
    }
    from = to;
  }
  return y;
}

}  // namespace vitkernels
