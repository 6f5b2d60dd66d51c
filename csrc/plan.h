// A model as a list of fused operations over named buffers, run for one step in one call.
//
// Built once by Python (src/llm_boost/models/), which says what each operation reads and writes; a step then
// runs the whole list on all threads with a barrier after each operation and no Python in between.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace llmb {

// A step: T tokens of S sequences (see engine/batch.py).
struct Step {
  size_t num_tokens = 0, num_seqs = 0, num_rows = 0, table_width = 0;
  const int32_t* token_ids = nullptr;     // [T]
  const int32_t* seq_starts = nullptr;    // [S + 1]
  const int32_t* context_lens = nullptr;  // [S]
  const int32_t* block_tables = nullptr;  // [S][table_width]
  const int32_t* logit_rows = nullptr;    // [R]
  const float* cos = nullptr;             // [T][head_dim / 2]
  const float* sin = nullptr;
};

struct CacheShape {
  CacheFormat format = CacheFormat::kInt16;
  size_t layers = 0, num_blocks = 0, block_size = 0;
};

// Keys and values of a block in all layers, which stand side by side.
constexpr size_t cache_block_bytes(const CacheShape& cache, const HeadShape& heads) {
  return 2 * cache.layers * heads.kv_heads * head_bytes(cache.format, cache.block_size, heads.head_dim);
}

struct Norm {
  const float* weight = nullptr;  // null: none
  float eps = 0;
};

// A weight of a linear, with its bias (rows padded to a block) or null.
struct LinearPart {
  Weight weight;
  const float* bias = nullptr;
};

class Plan {
 public:
  Plan(int num_threads, const std::string& isa, size_t max_tokens, HeadShape heads, CacheShape cache);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // A buffer of max_tokens rows of `width` floats; the number is its name.
  int buffer(size_t width);

  // out = table[token]; the table is [rows][width], f32 or bf16, unpacked.
  void embed(const void* table, Format format, size_t rows, size_t width, int out);
  // out (op)= norm(in) * weight^T + bias, the parts side by side.
  void linear(int in, Norm norm, const std::vector<LinearPart>& parts, Epilogue epilogue, int out);
  // Rotates q and k of `qkv`, writes k and v into the cache of `layer`, and attends.
  void attention(int qkv, size_t layer, Norm q_norm, Norm k_norm, const float* k_centre, float scale,
                 int out);
  // The last operation: logits of Step::logit_rows.
  void logits(int in, Norm norm, const Weight& weight);

  // Returns [num_rows][vocab]; valid until the next call. Throws std::invalid_argument on a step out of
  // range.
  const float* run(const Step& step);

  size_t vocab_size() const { return vocab_size_; }
  size_t head_dim() const { return heads_.head_dim; }
  size_t kv_heads() const { return heads_.kv_heads; }
  size_t cache_bytes() const { return cache_bytes_; }
  size_t workspace_bytes() const;
  int num_threads() const { return pool_.size(); }
  const char* isa() const { return kernels_.name; }

 private:
  struct Op;
  struct Embed;
  struct Linear;
  struct Attention;
  struct Context;
  struct AttentionItem;

  size_t width(int buffer) const;
  void check(const Step& step) const;
  void plan_attention(const Step& step);
  void split_attention(size_t most_tiles);
  void reserve(const Weight& weight);

  const Kernels& kernels_;
  ThreadPool pool_;
  const size_t max_tokens_;
  const HeadShape heads_;
  const CacheShape cache_;
  uint8_t* cache_data_ = nullptr;
  size_t cache_bytes_ = 0;
  size_t vocab_size_ = 0;
  size_t table_rows_ = 0;

  std::vector<std::vector<float>> buffers_;
  std::vector<size_t> widths_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<float> logits_;
  std::vector<AttentionItem> attention_items_;
  std::vector<float> partials_;
  std::vector<std::atomic<size_t>> partials_missing_;  // of each split piece of rows and kv head
  bool decode_only_ = false;

  struct ActivationStore;
  size_t act_values_ = 0, act_groups_ = 0;  // the largest row of activations: bytes, groups
  std::unique_ptr<ActivationStore> shared_;
  std::vector<std::unique_ptr<ActivationStore>> private_;
  std::vector<std::vector<uint8_t>> scratch_;
};

}  // namespace llmb
