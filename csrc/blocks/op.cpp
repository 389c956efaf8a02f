// Transformer blocks, one after the other, from kernels that other ops have. Attention apart every token goes its own way: threads meet before and after it only,
// and what lies between, up to the next block's queries, keys and values, each does for its own tokens.
#include "blocks/op.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "bottleneck/kernels.h"
#include "bottleneck/op.h"
#include "bottleneck/sharing.h"
#include "common/scratch.h"
#include "head_mixing/kernels.h"
#include "head_mixing/op.h"
#include "memory/op.h"
#include "packed/entry.h"

namespace vitkernels {
namespace {

using bottleneck::Bytes, bottleneck::columns_of, bottleneck::expansion_of, bottleneck::for_shares, bottleneck::hidden_row, bottleneck::kLeastTokens,
    bottleneck::kPanel, bottleneck::padded, bottleneck::reduction_of, bottleneck::run_by_outputs, bottleneck::run_pass;

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
      : x_(x), matrix_(matrices), program_(program), matrices_(matrices, bottleneck::bytes_of(dtype_of(matrices)), "matrices"), vectors_(vectors, bottleneck::bytes_of(dtype_of(vectors)), "vectors"),
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
  packed::Places places{false, 1, 1, 0};
  int64_t images, height, width, pitch, count, tokens;  // pitch: tokens from one image to the next
  std::vector<int32_t> begins;

  Sequences(int64_t batch, int64_t map_height, int64_t map_width, int64_t patch_height = 0, int64_t patch_width = 0, int64_t others = 0)
      : images(batch), height(map_height), width(map_width), pitch(map_height * map_width + others) {
    const bool whole = patch_height == 0;
    STD_TORCH_CHECK(
        whole || (patch_height > 0 && patch_width > 0 && height % patch_height == 0 && width % patch_width == 0),
        "vitkernels::transformer_blocks: the patch must divide the map");
    if (!whole) places = {false, patch_height, patch_width, width / patch_width};
    count = batch * places.height * places.width, tokens = height * width / (places.height * places.width);
    begins = packed::even_lengths(count, tokens);
  }
  int64_t pixels() const { return images * pitch; }
  // Rows of heads of a map in channels_last, `pixel` elements from one pixel to the next.
  Rows rows(const void* data, int64_t pixel, int64_t dim) const {
    const int64_t line = width * pixel;
    return {const_cast<void*>(data), places.width * pixel, dim, 1, pitch * pixel, places.height * line, line, pixel};
  }
};

// Queries of some tokens, and keys and values of all, whose elements are all `row` apart from one token to the next.
struct Heads {
  const char *q, *k, *v;
  int64_t q_row, row;
};

// The memory of tasks that run beside the images' tokens: of each block [M, H, D], each task's one after the other. A task is one more token behind those of its
// image, that sees them, itself and its memory; they do not see it.
struct Memory {
  const char *k, *v;
  std::vector<int64_t> begins;  // [tasks + 1]

  int64_t tasks() const { return static_cast<int64_t>(begins.size()) - 1; }

  Memory(const Tensor& x, const std::optional<Tensor>& memory_k, const std::optional<Tensor>& memory_v, const std::vector<int64_t>& groups, const std::vector<Block>& blocks)
      : k(memory_k ? static_cast<const char*>(memory_k->data_ptr()) : nullptr), v(memory_v ? static_cast<const char*>(memory_v->data_ptr()) : nullptr), begins{0} {
    STD_TORCH_CHECK(memory_k.has_value() == !groups.empty() && memory_v.has_value() == !groups.empty(),
                    "vitkernels::transformer_blocks: memory_k, memory_v and groups must all be given, or none of them");
    for (const int64_t length : groups) {
      STD_TORCH_CHECK(length >= 0, "vitkernels::transformer_blocks: a group's memory cannot be negative");
      begins.push_back(begins.back() + length);
    }
    for (const std::optional<Tensor>& t : {memory_k, memory_v}) {
      for (const Block& b : blocks) {
        STD_TORCH_CHECK(
            !t || (t->dim() == 4 && t->is_contiguous() && t->scalar_type() == x.scalar_type() && t->size(0) == static_cast<int64_t>(blocks.size()) &&
                   t->size(1) == begins.back() && t->size(2) == b.heads && t->size(3) == b.dim && !b.mixed && !b.normed),
            "vitkernels::transformer_blocks: memory_k and memory_v must be contiguous [blocks, M, H, D] of x's dtype, M the sum of groups, H and D those of all blocks, whose "
            "attention is plain");
      }
    }
  }
};

// Whether threads share out the outputs of each layer, see there.
bool shares_outputs(int64_t tokens, const std::vector<Block>& blocks, int64_t matrices, Bytes bytes) {
  int64_t narrowest = matrices;
  for (const Block& b : blocks) narrowest = std::min({narrowest, b.out.out, b.hidden});
  return bottleneck::shares_outputs(tokens, narrowest, matrices * bytes.matrices / static_cast<int64_t>(blocks.size()), bytes);
}

// How some tokens go through the layers.
struct Passes {
  int64_t tokens;
  bool by_outputs;
  Bytes bytes;
  int64_t row;
  Buffer<char> hidden;  // by outputs: between the two layers of an MLP

  Passes(int64_t count, const std::vector<Block>& blocks, int64_t matrices, int64_t most_hidden, Bytes sizes)
      : tokens(count), by_outputs(shares_outputs(count, blocks, matrices, sizes)), bytes(sizes), row(hidden_row(most_hidden, sizes.tokens)),
        hidden(by_outputs ? count * row * sizes.tokens : 0) {}

  void one(const bottleneck::Bottleneck& layer, const char* x, char* y) const {
    if (by_outputs) return run_by_outputs(layer, tokens, bytes, x, y);
    for_shares(tokens, kLeastTokens, [&](int64_t first, int64_t count) { run_pass(layer, first, count, bytes.tokens, x, y); });
  }

  // What follows a block's attention: x plus that, through the MLP, to y, and y through the layer behind the block, if there is one.
  void behind_attention(const Block& b, const char* attended, const char* x, char* y, const bottleneck::Bottleneck* next, char* out) const {
    if (by_outputs) {
      run_by_outputs(b.out, tokens, bytes, attended, y, x);
      run_by_outputs(expansion_of(b.mlp, row), tokens, bytes, y, hidden);
      run_by_outputs(reduction_of(b.mlp, row), tokens, bytes, hidden, y, y);
      if (next) run_by_outputs(*next, tokens, bytes, y, out);
      return;
    }
    for_shares(tokens, kLeastTokens, [&](int64_t first, int64_t count) {
      run_pass(b.out, first, count, bytes.tokens, attended, y, x);
      run_pass(b.mlp, first, count, bytes.tokens, y, y, y);  // in place: a token is read before it is written, and by no other
      if (next) run_pass(*next, first, count, bytes.tokens, y, out);
    });
  }
};

void attend_softmax(const Block& b, Dtype dtype, const Sequences& queries, const Sequences& keys, const Heads& heads, char* out) {
  packed::Forward a{};
  a.dtype = dtype, a.places = keys.places;
  a.sequences = keys.count, a.total_q = queries.count * queries.tokens, a.total_k = keys.count * keys.tokens;
  a.heads = a.kv_heads = b.heads, a.dim = a.value_dim = b.dim;
  a.cu_q = queries.begins.data(), a.cu_k = keys.begins.data();
  a.q = queries.rows(heads.q, heads.q_row, b.dim), a.k = keys.rows(heads.k, heads.row, b.dim), a.v = keys.rows(heads.v, heads.row, b.dim);
  if (b.normed) a.norm = packed::Norm::kLayer, a.norm_eps = b.scales.heads_eps, a.q_norm = b.q_norm, a.k_norm = b.k_norm;
  a.scale = b.scales.logits;
  const packed::Schedule schedule = packed::make_schedule(a.cu_q, a.cu_k, nullptr, a.sequences, a.kv_heads, num_threads(), true);
  a.schedule = &schedule;
  a.out = queries.rows(out, b.channels(), b.dim);
  packed::kernels().forward(a);
}

void attend_mixed(const Block& b, Dtype dtype, const Sequences& queries, const Sequences& keys, const Heads& heads, char* out) {
  const auto map = [&](const char* data, int64_t tokens, int64_t row) { return Map{const_cast<char*>(data), tokens * row, b.dim, row, 1}; };
  const std::vector<double> zeros(static_cast<size_t>(b.heads));
  head_mixing::Forward a{};
  a.dtype = dtype;
  a.batch = keys.images, a.heads = b.heads, a.queries = queries.tokens, a.keys = keys.tokens, a.dim = a.value_dim = b.dim;
  a.q = map(heads.q, queries.tokens, heads.q_row), a.k = map(heads.k, keys.tokens, heads.row), a.v = map(heads.v, keys.tokens, heads.row);
  a.norm = head_mixing::Norm::kLayer;
  a.mix = b.mix, a.mix_bias = zeros.data(), a.weight = b.mix_weight, a.constant = b.mix_bias;
  a.eps = b.scales.mix_eps, a.scale = b.scales.logits;
  a.out = out;
  head_mixing::kernels().forward(a);
}

void attend(const Block& b, Dtype dtype, const Sequences& queries, const Sequences& keys, const Heads& heads, char* out) {
  (b.mixed ? attend_mixed : attend_softmax)(b, dtype, queries, keys, heads, out);
}

// The tokens of tasks, which are behind those of each image, also where not all of its tokens have queries.
void attend_tasks(
    const Block& b, Dtype dtype, const Sequences& queries, const Sequences& keys, const Memory& memory, int64_t block, const Heads& heads, int64_t bytes, char* out) {
  const int64_t tasks = memory.tasks(), channels = b.channels(), of_block = block * memory.begins.back() * channels * bytes;
  const Buffer<char> found(keys.images * tasks * channels * bytes);
  const Buffer<double> lse(keys.images * b.heads * tasks);
  const auto map = [&](const char* data, const Sequences& of, int64_t first, int64_t row) { return Map{const_cast<char*>(data) + first * row * bytes, of.pitch * row, b.dim, row, 1}; };
  const auto rows = [&](const char* data) { return Rows{const_cast<char*>(data) + of_block, channels, b.dim, 1}; };
  memory::Forward a{};
  a.dtype = dtype;
  a.batch = keys.images, a.heads = b.heads, a.queries = tasks, a.keys = keys.tokens, a.dim = a.value_dim = b.dim;
  a.q = map(heads.q, queries, queries.tokens, heads.q_row), a.k = map(heads.k, keys, 0, heads.row), a.v = map(heads.v, keys, 0, heads.row);
  a.own_k = map(heads.k, keys, keys.tokens, heads.row), a.own_v = map(heads.v, keys, keys.tokens, heads.row);
  a.memory_k = rows(memory.k), a.memory_v = rows(memory.v);
  a.groups = tasks, a.memory_begin = memory.begins.data();
  a.scale = b.scales.logits;
  a.out = found.get(), a.lse = lse.get();
  memory::kernels().forward(a);
  const int64_t size = tasks * channels * bytes;
  for (int64_t i = 0; i < queries.images; ++i) {
    std::memcpy(out + (i * queries.pitch + queries.tokens) * channels * bytes, found + i * size, static_cast<size_t>(size));
  }
}

}  // namespace

Tensor transformer_blocks(
    const Tensor& x, const Tensor& matrices, const Tensor& vectors, const Tensor& numbers, std::vector<int64_t> program, int64_t patch_height, int64_t patch_width,
    int64_t first, const std::optional<Tensor>& memory_k, const std::optional<Tensor>& memory_v, std::vector<int64_t> groups) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(1) > 0 && channels_last(x), "vitkernels::transformer_blocks: x must be [B, C, H, W] in channels_last memory, with channels");
  STD_TORCH_CHECK(
      vectors.scalar_type() == accumulation_type(x) && (matrices.scalar_type() == accumulation_type(x) || matrices.scalar_type() == ScalarType::BFloat16) &&
          numbers.scalar_type() == ScalarType::Double,
      "vitkernels::transformer_blocks: vectors must be of the accumulation dtype, matrices, too, or bfloat16, and numbers float64");
  const Reader reader(x, matrices, vectors, numbers, program);
  const std::vector<Block>& blocks = reader.blocks();
  STD_TORCH_CHECK(!blocks.empty(), "vitkernels::transformer_blocks: the program is empty");
  const Memory memory(x, memory_k, memory_v, groups, blocks);
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3) - memory.tasks();
  STD_TORCH_CHECK(memory.tasks() == 0 || (height == 1 && width >= 0 && patch_height == 0),
                  "vitkernels::transformer_blocks: with memory x must be [B, C, 1, N + T], a token for each of the T groups behind the N others, no patches");
  const Sequences sequences(batch, height, width, patch_height, patch_width, memory.tasks());
  STD_TORCH_CHECK(first >= 0 && first <= height * width && (first == 0 || patch_height == 0),
                  "vitkernels::transformer_blocks: first must be from 0, for all, to the ", height * width, " pixels of an image, and of patches it must be 0");
  const bool fewer = first > 0;
  const Sequences wanted = fewer ? Sequences(batch, 1, first, 0, 0, memory.tasks()) : sequences;
  const Bytes bytes{bottleneck::bytes_of(dtype_of(x)), bottleneck::bytes_of(dtype_of(matrices)), bottleneck::bytes_of(dtype_of(vectors))};
  const Dtype dtype = dtype_of(x);
  const int64_t columns = wanted.width + memory.tasks();
  Tensor y = empty_map(batch, channels, wanted.height, columns, true, x.scalar_type());
  int64_t most = 0, most_hidden = 0;
  for (const Block& b : blocks) {
    STD_TORCH_CHECK(b.in.pairs == b.out.pairs && b.in.pairs == b.mlp.pairs && (b.in.pairs || matrices.scalar_type() == accumulation_type(x)),
                    "vitkernels::transformer_blocks: bfloat16 matrices are for bfloat16 alone");
    STD_TORCH_CHECK(!b.mixed || patch_height == 0, "vitkernels::transformer_blocks: maps are mixed of whole images, not of patches");
    most = std::max(most, b.channels()), most_hidden = std::max(most_hidden, b.hidden);
  }
  const int64_t pixels = sequences.pixels(), token = channels * bytes.tokens;
  if (pixels == 0) return y;
  const Passes all(pixels, blocks, matrices.numel(), most_hidden, bytes);
  const Buffer<char> qkv(pixels * 3 * most * bytes.tokens), attended(pixels * most * bytes.tokens), stream(fewer ? pixels * token : 0);
  const char* from = static_cast<const char*>(x.data_ptr());
  char* const to = fewer ? stream.get() : static_cast<char*>(y.data_ptr());

  // Of a last block whose tokens are not all wanted, the keys and values alone, from the panel on that they begin in.
  const Block& last = blocks.back();
  const int64_t skipped = last.channels() / kPanel * kPanel;
  const bottleneck::Bottleneck keys_and_values = columns_of(last.in, skipped, 3 * last.channels() - skipped, bytes);
  const auto begin = [&](size_t i) { return fewer && &blocks[i] == &last ? std::pair(&keys_and_values, qkv + skipped * bytes.tokens) : std::pair(&blocks[i].in, qkv.get()); };
  const auto heads_of = [&](const Block& b) {
    const int64_t part = b.channels() * bytes.tokens;
    return Heads{qkv, qkv + part, qkv + 2 * part, 3 * b.channels(), 3 * b.channels()};
  };

  const auto [layer, out] = begin(0);
  all.one(*layer, from, out);
  for (size_t i = 0; i + (fewer ? 1 : 0) < blocks.size(); ++i, from = to) {
    attend(blocks[i], dtype, sequences, sequences, heads_of(blocks[i]), attended);
    if (memory.tasks() > 0) attend_tasks(blocks[i], dtype, sequences, sequences, memory, static_cast<int64_t>(i), heads_of(blocks[i]), bytes.tokens, attended);
    if (i + 1 == blocks.size()) {
      all.behind_attention(blocks[i], attended, from, to, nullptr, nullptr);
    } else {
      const auto [next, next_out] = begin(i + 1);
      all.behind_attention(blocks[i], attended, from, to, next, next_out);
    }
  }
  if (!fewer) return y;

  const Passes few(wanted.pixels(), blocks, matrices.numel(), most_hidden, bytes);
  const Buffer<char> tokens(few.tokens * token), queries(few.tokens * last.channels() * bytes.tokens);
  for (int64_t b = 0; b < batch; ++b) {
    const char* image = from + b * sequences.pitch * token;
    char* kept = tokens + b * wanted.pitch * token;
    std::memcpy(kept, image, static_cast<size_t>(first * token));
    std::memcpy(kept + first * token, image + sequences.tokens * token, static_cast<size_t>(memory.tasks() * token));
  }
  bottleneck::Bottleneck of_queries = columns_of(last.in, 0, last.channels(), bytes);
  of_queries.y_row = last.channels();
  few.one(of_queries, tokens, queries);
  Heads heads = heads_of(last);
  heads.q = queries, heads.q_row = last.channels();
  attend(last, dtype, wanted, sequences, heads, attended);
  if (memory.tasks() > 0) attend_tasks(last, dtype, wanted, sequences, memory, static_cast<int64_t>(blocks.size()) - 1, heads, bytes.tokens, attended);
  few.behind_attention(last, attended, tokens, static_cast<char*>(y.data_ptr()), nullptr, nullptr);
  return y;
}

}  // namespace vitkernels
