// Sampling: from a row of logits to the next token of its sequence.
//
// sample() is a pure function of (logits, what the sequence asked for, its tokens so far): neither the other
// rows of the batch, nor the number of threads, nor preemption can change a text. Random numbers come from a
// counter (Philox 4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), the counter
// is the position in the output.
//
// The order is vLLM's: masks (of a grammar, of the tokens allowed), bad words, logit bias, stop tokens masked
// below min_tokens, penalties, temperature, min-p, top-k, top-p, and typical-p last. Wherever tokens are
// ranked, equal logits are ranked by token id, the lower first.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace llmb {

// What one sequence asked for; made once, when the request arrives.
struct SamplingRow {
  float temperature = 1.0f;  // 0 is greedy
  int32_t top_k = 0;         // 0 keeps all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;  // over prompt and output
  float presence_penalty = 0.0f;    // over output only
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
  uint32_t stream = 0;        // the sequence's index in its request
  int64_t prompt_len = 0;     // tokens[prompt_len:] are output
  int64_t min_tokens = 0;     // stop_ids are masked while the output is shorter
  int32_t num_logprobs = -1;  // -1: none; 0: of the token alone; N: of the best N too
  std::vector<int32_t> stop_ids;
  std::vector<std::pair<int32_t, float>> logit_bias;
  float typical_p = 1.0f;
  std::vector<uint32_t> allowed;                // a mask (see SamplingTask), or empty
  std::vector<std::vector<int32_t>> bad_words;  // token ids; the last one may not follow the others
};

enum class SampleStatus : uint8_t {
  kOk = 0,
  kNotFinite = 1,       // a NaN or an infinity among the logits
  kNothingAllowed = 2,  // every token is masked
  kBadToken = 3,        // a token that is not in the vocabulary, among the sequence's own or in a rule
};

struct Sample {
  int32_t token = -1;
  SampleStatus status = SampleStatus::kOk;
  float logprob = 0.0f;  // log-softmax of the logits as they came, before any rule
  int32_t rank = 0;      // 1 is the likeliest
};

// A token with its logit or its weight.
struct Scored {
  float score;
  int32_t id;
};

// A row to sample and where its result goes.
struct SamplingTask {
  const SamplingRow* row;
  const int32_t* tokens;  // [num_tokens], prompt and output
  size_t num_tokens;
  const uint32_t* mask;  // bit i % 32 of word i / 32: whether token i may come; null: all may
  int32_t* top_ids;
  float* top_logprobs;
  Sample sample;
};

// A row whose token is known: its log-probability is asked for.
struct ScoringTask {
  int32_t* top_ids;
  float* top_logprobs;
  Sample sample;
};

// Samples rows one after another; it holds the scratch memory, so one RowSampler serves one thread.
class RowSampler {
 public:
  explicit RowSampler(size_t vocab) : vocab_(vocab) {}

  // logits [vocab]. When row.num_logprobs > 0, top_ids and top_logprobs [num_logprobs] receive the best
  // tokens, likeliest first (-1 past the end of the vocabulary).
  Sample sample(const float* logits, const SamplingTask& task);

  // Of `sample.token`, whose logprob and rank it sets; the best num_logprobs tokens as above.
  void score(const float* logits, int32_t num_logprobs, Sample& sample, int32_t* top_ids,
             float* top_logprobs);

 private:
  const float* apply_rules(const float* logits, const SamplingTask& task, bool hold_stops);
  bool forbid_bad_words(const SamplingTask& task);
  int32_t draw(const float* logits, float peak, const SamplingRow& row, double u);
  int32_t draw_from_all(double u) const;
  void keep_nucleus(double target);
  void keep_typical(double typical_p);
  void select_top(const float* logits, size_t k);
  void weigh(const float* logits, float peak, float inverse_temperature, float floor);
  void report_logprobs(const float* logits, float peak, int32_t num_logprobs, Sample& sample,
                       int32_t* top_ids, float* top_logprobs);

  size_t vocab_;
  std::vector<float> edited_;       // the logits after bias, mask and penalties
  std::vector<float> weights_;      // exp((logit - peak) / temperature)
  std::vector<double> block_sums_;  // of weights_
  std::vector<double> buckets_;
  std::vector<Scored> candidates_, ranking_;
  std::vector<int32_t> output_counts_, seen_;  // per token; zero between calls
  std::vector<int32_t> touched_;
};

// Samples the rows of a batch; many rows are spread over threads. One caller at a time.
class Sampler {
 public:
  static constexpr size_t kRowsAThread = 4;  // fewer are done before a thread has started

  Sampler(size_t vocab, size_t threads)
      : vocab_(vocab), samplers_(std::max<size_t>(threads, 1), RowSampler(vocab)) {}
  size_t vocab() const { return vocab_; }
  void sample(const float* logits, std::vector<SamplingTask>& tasks);  // logits [tasks, vocab]
  void score(const float* logits, int32_t num_logprobs, std::vector<ScoringTask>& tasks);

 private:
  template <typename Work>
  void share_out(size_t count, const Work& work);

  size_t vocab_;
  std::vector<RowSampler> samplers_;
};

// 4 x 32 random bits for a counter under a key.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t key);

}  // namespace llmb
