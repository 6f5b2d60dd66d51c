#include "plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace llmb {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

constexpr size_t kItemsPerThread = 8;  // of attention: enough to share out evenly

size_t padded_rows(size_t n) { return round_up(n, kPanelRows); }

}  // namespace

struct Plan::ActivationStore {
  std::vector<uint8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  void reserve(size_t rows, size_t row_bytes, size_t row_groups) {
    values.resize(rows * row_bytes);
    scales.resize(rows * row_groups);
    offsets.resize(rows * 2 * row_groups);
  }
  size_t bytes() const { return values.size() + 4 * (scales.size() + offsets.size()); }
};

// Query rows of one sequence against tiles of its keys, for each kv head. Rows whose tiles are shared out
// among `pieces` items leave partial results at `partials`, which the last of them folds.
struct Plan::AttentionItem {
  size_t seq, row_begin, row_end, tile_begin, tile_end, tiles;
  size_t pieces = 1, split = 0, partials = 0;

  size_t rows() const { return row_end - row_begin; }
};

struct Plan::Context {
  Plan& plan;
  const Step& step;
};

// One operation of the list. `next` hands out units of work; it is set back before every step.
struct Plan::Op {
  std::atomic<size_t> next{0};
  std::atomic<size_t> prepared{0};

  virtual ~Op() = default;
  virtual void run(const Context& context, int thread) = 0;

  template <typename F>
  static void share(std::atomic<size_t>& counter, size_t count, const F& work) {
    for (size_t i; (i = counter.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  }
};

struct Plan::Embed : Plan::Op {
  const void* table;
  Format format;
  size_t rows, width;
  int out;

  void run(const Context& c, int) override {
    float* to = c.plan.buffers_[out].data();
    share(next, c.step.num_tokens, [&](size_t t) {
      const size_t at = static_cast<size_t>(c.step.token_ids[t]) * width;
      if (format == Format::kF32)
        std::memcpy(to + t * width, static_cast<const float*>(table) + at, width * sizeof(float));
      else
        c.plan.kernels_.widen(static_cast<const uint16_t*>(table) + at, to + t * width, width);
    });
  }
};

struct Plan::Linear : Plan::Op {
  struct Part {
    LinearArgs args;
    size_t column;      // of out, where the part begins
    size_t num_chunks;  // units of work
  };

  int in;
  Norm norm;
  int out;  // -1: the logits, of the rows that want them
  std::vector<Part> parts;
  size_t num_chunks = 0;

  void add(const LinearPart& part, Epilogue epilogue, size_t out_stride) {
    LinearArgs a;
    a.weight = part.weight;
    a.bias = part.bias;
    a.epilogue = epilogue;
    a.out_stride = out_stride;
    a.out_cols = epilogue == Epilogue::kSiluMul ? out_stride : part.weight.rows;
    const size_t column = parts.empty() ? 0 : parts.back().column + parts.back().args.weight.rows;
    parts.push_back({a, column, round_up(part.weight.rows, kChunkRows) / kChunkRows});
    num_chunks += parts.back().num_chunks;
  }

  void run(const Context& c, int thread) override {
    Plan& plan = c.plan;
    const size_t tokens = out < 0 ? c.step.num_rows : c.step.num_tokens;
    const Activations input = activations(c, tokens, thread);
    const Scratch scratch{reinterpret_cast<float*>(plan.scratch_[thread].data() + kExpandedBytes),
                          plan.scratch_[thread].data()};
    float* to = out < 0 ? plan.logits_.data() : plan.buffers_[out].data();
    share(next, num_chunks, [&](size_t chunk) {
      const Part* part = parts.data();
      for (; chunk >= part->num_chunks; ++part) chunk -= part->num_chunks;
      LinearArgs a = part->args;
      a.num_tokens = tokens;
      a.input = input;
      a.out = to + part->column;
      const size_t first = chunk * kChunkBlocks, blocks = round_up(a.weight.rows, kBlockRows) / kBlockRows;
      plan.kernels_.linear(a, first, std::min<size_t>(kChunkBlocks, blocks - first), scratch);
    });
  }

  // One panel is prepared by every thread for itself, which costs less than a barrier; more are shared out.
  Activations activations(const Context& c, size_t tokens, int thread) {
    Plan& plan = c.plan;
    const bool one_panel = tokens <= kPanelRows;
    ActivationStore& store = one_panel ? *plan.private_[thread] : *plan.shared_;
    Activations act;
    act.format = is_quantized(parts[0].args.weight.format) ? Format::kInt8 : parts[0].args.weight.format;
    act.cols = parts[0].args.weight.cols;
    act.num_steps = steps(act.format, act.cols);
    act.num_groups = is_quantized(act.format) ? padded_cols(act.format, act.cols) / kGroup : 0;
    act.values = store.values.data();
    act.scales = store.scales.data();
    act.offsets = store.offsets.data();
    const auto prepare = [&](size_t panel) {
      const float* rows[kPanelRows];
      const size_t first = panel * kPanelRows, n = std::min(kPanelRows, tokens - first);
      for (size_t i = 0; i < n; ++i) {
        const size_t row = out < 0 ? static_cast<size_t>(c.step.logit_rows[first + i]) : first + i;
        rows[i] = plan.buffers_[in].data() + row * plan.widths_[in];
      }
      plan.kernels_.activate(rows, n, norm.weight, norm.eps, act, first);
    };
    if (one_panel) {
      if (tokens) prepare(0);
    } else {
      share(prepared, (tokens + kPanelRows - 1) / kPanelRows, prepare);
      plan.pool_.barrier();
    }
    return act;
  }
};

struct Plan::Attention : Plan::Op {
  int qkv, out;
  size_t layer;
  Norm q_norm, k_norm;
  const float* k_centre;
  float scale;

  void run(const Context& c, int) override {
    Plan& plan = c.plan;
    const size_t kv_heads = plan.heads_.kv_heads, items = plan.attention_items_.size();
    if (!plan.decode_only_) {
      share(prepared, c.step.num_tokens, [&](size_t token) {
        const int32_t* starts = c.step.seq_starts;
        const size_t seq =
            std::upper_bound(starts, starts + c.step.num_seqs + 1, static_cast<int32_t>(token)) - starts - 1;
        const HeadsArgs args = heads_of(c, seq);
        for (size_t head = 0; head < kv_heads; ++head)
          plan.kernels_.attention.store_kv(args, token - starts[seq], head);
      });
      plan.pool_.barrier();
    }
    share(next, items * kv_heads, [&](size_t i) {  // the last rows see most keys: they go first
      attend(c, plan.attention_items_[items - 1 - i / kv_heads], i % kv_heads);
    });
  }

  HeadsArgs heads_of(const Context& c, size_t seq) const {
    const Plan& plan = c.plan;
    const size_t first = c.step.seq_starts[seq], dim = plan.heads_.head_dim;
    const size_t stride = cache_block_bytes(plan.cache_, plan.heads_),
                 bytes = stride / plan.cache_.layers / 2;
    HeadsArgs a;
    a.shape = plan.heads_;
    a.qkv = plan.buffers_[qkv].data() + first * plan.widths_[qkv];
    a.qkv_stride = plan.widths_[qkv];
    a.cos = c.step.cos + first * (dim / 2);
    a.sin = c.step.sin + first * (dim / 2);
    a.q_norm = q_norm.weight;
    a.k_norm = k_norm.weight;
    a.k_centre = k_centre;
    a.eps = q_norm.eps;
    a.cache.format = plan.cache_.format;
    a.cache.keys = plan.cache_data_ + 2 * layer * bytes;
    a.cache.values = a.cache.keys + bytes;
    a.cache.block_stride = stride;
    a.cache.block_size = plan.cache_.block_size;
    a.cache.head_dim = dim;
    a.block_table = c.step.block_tables + seq * c.step.table_width;
    a.first_position = c.step.context_lens[seq] - (c.step.seq_starts[seq + 1] - first);
    return a;
  }

  void attend(const Context& c, const AttentionItem& item, size_t kv_head) const {
    Plan& plan = c.plan;
    const AttentionKernels& kernels = plan.kernels_.attention;
    AttentionArgs a;
    static_cast<HeadsArgs&>(a) = heads_of(c, item.seq);
    a.scale = scale;
    a.out = plan.buffers_[out].data() + c.step.seq_starts[item.seq] * plan.widths_[out];
    a.out_stride = plan.widths_[out];
    a.kv_head = kv_head;
    a.row_begin = item.row_begin;
    a.row_end = item.row_end;
    a.tile_begin = item.tile_begin;
    a.tile_end = item.tile_end;
    // A decode's key and value are written by whoever first reads them.
    if (plan.decode_only_ && item.tile_end == item.tiles) kernels.store_kv(a, 0, kv_head);
    if (item.pieces == 1) return kernels.run(a);
    const size_t size = Partial::floats(item.tiles, item.rows(), a.shape.head_dim);
    a.partial = Partial(plan.partials_.data() + item.partials + kv_head * size, item.tiles, item.rows());
    kernels.run(a);
    std::atomic<size_t>& missing = plan.partials_missing_[item.split * a.shape.kv_heads + kv_head];
    if (missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    missing.store(item.pieces, std::memory_order_relaxed);  // for the next layer
    kernels.fold(a);
  }
};

Plan::Plan(int num_threads, const std::string& isa, size_t max_tokens, HeadShape heads, CacheShape cache)
    : kernels_(kernels_for(isa)),
      pool_(num_threads),
      max_tokens_(max_tokens),
      heads_(heads),
      cache_(cache),
      shared_(new ActivationStore) {
  if (heads.head_dim % 16 || heads.head_dim > 256 || heads.head_dim == 0 || heads.kv_heads == 0 ||
      heads.heads % heads.kv_heads)
    throw std::invalid_argument(
        "head_dim must be a multiple of 16 up to 256, and heads a multiple of kv_heads");
  if (cache.block_size == 0 || cache.block_size % 16)
    throw std::invalid_argument("block_size must be a multiple of 16");
  cache_bytes_ = cache.num_blocks * cache_block_bytes(cache, heads);
  // Anonymous pages are zero and cost nothing until a block is first written.
  void* data =
      mmap(nullptr, cache_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  cache_data_ = static_cast<uint8_t*>(data);
  madvise(data, cache_bytes_, MADV_HUGEPAGE);  // a block's layers and heads would be a page each
  for (int t = 0; t < num_threads; ++t) {
    private_.emplace_back(new ActivationStore);
    scratch_.emplace_back(kExpandedBytes + padded_rows(max_tokens) * kChunkRows * sizeof(float));
  }
}

Plan::~Plan() {
  if (cache_data_) munmap(cache_data_, cache_bytes_);
}

int Plan::buffer(size_t width) {
  buffers_.emplace_back(max_tokens_ * width);
  widths_.push_back(width);
  return static_cast<int>(buffers_.size()) - 1;
}

size_t Plan::width(int buffer) const {
  require(buffer >= 0 && static_cast<size_t>(buffer) < widths_.size(), "no such buffer");
  return widths_[buffer];
}

void Plan::embed(const void* table, Format format, size_t rows, size_t width, int out) {
  require(this->width(out) == width, "embed: the buffer is not as wide as the table");
  auto op = std::make_unique<Embed>();
  op->table = table;
  op->format = format;
  op->rows = rows;
  op->width = width;
  op->out = out;
  table_rows_ = rows;
  ops_.push_back(std::move(op));
}

void Plan::reserve(const Weight& weight) {
  const Format f = is_quantized(weight.format) ? Format::kInt8 : weight.format;
  act_values_ = std::max(act_values_, steps(f, weight.cols) * 4);
  if (is_quantized(f)) act_groups_ = std::max(act_groups_, padded_cols(f, weight.cols) / kGroup);
  shared_->reserve(padded_rows(max_tokens_), act_values_, act_groups_);
  for (auto& store : private_) store->reserve(kPanelRows, act_values_, act_groups_);
}

void Plan::linear(int in, Norm norm, const std::vector<LinearPart>& parts, Epilogue epilogue, int out) {
  auto op = std::make_unique<Linear>();
  op->in = in;
  op->norm = norm;
  op->out = out;
  size_t rows = 0;
  for (const LinearPart& part : parts) {
    require(part.weight.cols == width(in), "linear: the buffer is not as wide as the weight has columns");
    require(is_quantized(part.weight.format) == is_quantized(parts[0].weight.format) &&
                (is_quantized(part.weight.format) || part.weight.format == parts[0].weight.format),
            "linear: parts must take the same activations");
    rows += part.weight.rows;
  }
  if (epilogue == Epilogue::kSiluMul) {
    require(parts.size() == 1 && rows % (2 * kBlockRows) == 0 && width(out) <= rows / 2 &&
                round_up(width(out), kBlockRows) == rows / 2,
            "linear: silu_mul takes one weight of gate and up in whole blocks, twice as many rows as the "
            "buffer is wide");
  } else {
    require(out < 0 || width(out) == rows, "linear: the buffer is not as wide as the weights have rows");
  }
  for (const LinearPart& part : parts) reserve(part.weight);
  for (const LinearPart& part : parts) op->add(part, epilogue, out < 0 ? rows : widths_[out]);
  ops_.push_back(std::move(op));
}

void Plan::attention(int qkv, size_t layer, Norm q_norm, Norm k_norm, const float* k_centre, float scale,
                     int out) {
  require(layer < cache_.layers, "attention: no such layer");
  require(width(qkv) == (heads_.heads + 2 * heads_.kv_heads) * heads_.head_dim &&
              width(out) == heads_.heads * heads_.head_dim,
          "attention: the buffers do not fit the heads");
  auto op = std::make_unique<Attention>();
  op->qkv = qkv;
  op->layer = layer;
  op->q_norm = q_norm;
  op->k_norm = k_norm;
  op->k_centre = k_centre;
  op->scale = scale;
  op->out = out;
  ops_.push_back(std::move(op));
}

void Plan::logits(int in, Norm norm, const Weight& weight) {
  vocab_size_ = weight.rows;
  linear(in, norm, {{weight, nullptr}}, Epilogue::kStore, -1);
}

void Plan::check(const Step& s) const {
  const auto fail = [](const std::string& what) { throw std::invalid_argument("step: " + what); };
  if (s.num_tokens == 0 || s.num_tokens > max_tokens_) fail("num_tokens out of range");
  if (s.num_seqs == 0 || s.num_rows > s.num_tokens) fail("num_seqs or logit_rows out of range");
  for (size_t t = 0; t < s.num_tokens; ++t)
    if (s.token_ids[t] < 0 || static_cast<size_t>(s.token_ids[t]) >= table_rows_)
      fail("token id out of range");
  if (s.seq_starts[0] != 0 || static_cast<size_t>(s.seq_starts[s.num_seqs]) != s.num_tokens)
    fail("seq_starts");
  for (size_t i = 0; i < s.num_seqs; ++i) {
    const long n = static_cast<long>(s.seq_starts[i + 1]) - s.seq_starts[i], context = s.context_lens[i];
    if (n < 1 || context < n) fail("context_lens");
    const size_t blocks = (context + cache_.block_size - 1) / cache_.block_size;
    if (blocks > s.table_width) fail("block table too short");
    for (size_t b = 0; b < blocks; ++b) {
      const int32_t block = s.block_tables[i * s.table_width + b];
      if (block < 0 || static_cast<size_t>(block) >= cache_.num_blocks) fail("block out of range");
    }
  }
  for (size_t r = 0; r < s.num_rows; ++r)
    if (s.logit_rows[r] < 0 || static_cast<size_t>(s.logit_rows[r]) >= s.num_tokens) fail("logit_rows");
}

// Which rows meet which tiles of keys is a matter of balance alone: no result depends on it.
void Plan::plan_attention(const Step& step) {
  decode_only_ = step.num_tokens == step.num_seqs && heads_.heads / heads_.kv_heads <= kAttentionRows;
  attention_items_.clear();
  const size_t group = heads_.heads / heads_.kv_heads;
  size_t total = 0;  // tiles
  for (size_t seq = 0; seq < step.num_seqs; ++seq) {
    const size_t tokens = step.seq_starts[seq + 1] - step.seq_starts[seq], rows = tokens * group;
    for (size_t row = 0; row < rows; row += kAttentionRows) {
      const size_t end = std::min(row + kAttentionRows, rows);
      const size_t seen = step.context_lens[seq] - tokens + (end - 1) / group + 1;
      const size_t tiles = (seen + kKeyTile - 1) / kKeyTile;
      attention_items_.push_back({seq, row, end, 0, tiles, tiles});
      total += tiles * heads_.kv_heads;
    }
  }
  split_attention(std::max<size_t>(2, total / (kItemsPerThread * pool_.size())));
}

void Plan::split_attention(size_t most_tiles) {
  std::vector<AttentionItem> items;
  size_t splits = 0, floats = 0;
  for (AttentionItem item : attention_items_) {
    item.pieces = (item.tiles + most_tiles - 1) / most_tiles;
    item.split = splits;
    item.partials = floats;
    for (size_t i = 0; i < item.pieces; ++i) {
      item.tile_begin = item.tiles * i / item.pieces;
      item.tile_end = item.tiles * (i + 1) / item.pieces;
      items.push_back(item);
    }
    if (item.pieces == 1) continue;
    splits += 1;
    floats += heads_.kv_heads * Partial::floats(item.tiles, item.rows(), heads_.head_dim);
  }
  attention_items_ = std::move(items);
  if (partials_.size() < floats) partials_.resize(floats);
  partials_missing_ = std::vector<std::atomic<size_t>>(splits * heads_.kv_heads);
  for (const AttentionItem& item : attention_items_)
    if (item.pieces > 1)
      for (size_t head = 0; head < heads_.kv_heads; ++head)
        partials_missing_[item.split * heads_.kv_heads + head].store(item.pieces, std::memory_order_relaxed);
}

const float* Plan::run(const Step& step) {
  check(step);
  plan_attention(step);
  if (logits_.size() < step.num_rows * vocab_size_) logits_.resize(step.num_rows * vocab_size_);
  for (auto& op : ops_) {
    op->next.store(0, std::memory_order_relaxed);
    op->prepared.store(0, std::memory_order_relaxed);
  }
  const Context context{*this, step};
  pool_.run([&](int thread) {
    for (auto& op : ops_) {
      op->run(context, thread);
      pool_.barrier();
    }
  });
  return logits_.data();
}

size_t Plan::workspace_bytes() const {
  size_t bytes = shared_->bytes() + (logits_.size() + partials_.size()) * sizeof(float);
  for (const auto& b : buffers_) bytes += b.size() * sizeof(float);
  for (const auto& p : private_) bytes += p->bytes();
  for (const auto& s : scratch_) bytes += s.size();
  return bytes;
}

}  // namespace llmb
