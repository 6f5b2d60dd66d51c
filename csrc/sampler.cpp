#include "sampler.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>

namespace llmb {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr size_t kLanes = 16;    // independent accumulators: what lets the compiler use vectors in IEEE order
constexpr size_t kBlock = 1024;  // weights that share a partial sum

// Weights lie in [0, 1]: their bits from the third of the mantissa up, sign and exponent included, are below
// this.
constexpr int kBucketShift = 20;
constexpr size_t kBuckets = (std::bit_cast<uint32_t>(1.0f) >> kBucketShift) + 1;

// The one order of tokens: higher score first, then lower id.
bool before(const Scored& a, const Scored& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

// e^x for x <= 0 within 2 units in the last place; 0 below -87. Our own, so that it becomes vector code and
// gives the same bits on every machine (Cody and Waite's reduction, the polynomial of Cephes' expf).
inline float exp_negative(float x) {
  // Compared as integers: a branch on floats would keep the loop from becoming vectors.
  constexpr int32_t kLargest = std::bit_cast<int32_t>(87.0f);
  const int32_t magnitude = std::bit_cast<int32_t>(x) & 0x7FFFFFFF;
  const float y = -std::bit_cast<float>(std::min(magnitude, kLargest));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float n = (y * 1.44269504f + kRound) - kRound;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  const int32_t keep = -static_cast<int32_t>(magnitude <= kLargest);
  return std::bit_cast<float>(std::bit_cast<int32_t>(p * power) & keep);
}

inline float max_of(const float* x, size_t n) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInf);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

inline bool all_finite(const float* x, size_t n) {
  float lanes[kLanes] = {};  // x * 0 is 0 for a finite x and NaN for all others, and NaN stays
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * 0.0f;
  for (; i < n; ++i) lanes[0] += x[i] * 0.0f;
  return std::accumulate(lanes, lanes + kLanes, 0.0f) == 0.0f;
}

// The highest logit, of equal ones the first. Block by block, so that a row is read from memory once.
struct Peak {
  float value = -kInf;
  int32_t id = -1;
  bool finite = true;
};

Peak find_peak(const float* logits, size_t vocab) {
  Peak peak;
  for (size_t start = 0; start < vocab; start += kBlock) {
    const size_t n = std::min(kBlock, vocab - start);
    peak.finite = peak.finite && all_finite(logits + start, n);
    const float best = max_of(logits + start, n);
    if (best > peak.value) {
      peak.value = best;
      peak.id = static_cast<int32_t>(std::find(logits + start, logits + start + n, best) - logits);
    }
  }
  return peak;
}

// out [vocab] = the logits of the tokens whose bit is set, and minus infinity for the others.
void select(const float* logits, const uint32_t* mask, float* out, size_t vocab) {
  for (size_t start = 0; start < vocab; start += 32) {
    const uint32_t word = mask[start / 32];
    const float* x = logits + start;
    float* to = out + start;
    const size_t n = std::min<size_t>(32, vocab - start);
    if (word == 0) {
      std::fill_n(to, n, -kInf);
    } else if (word == ~uint32_t{0}) {
      std::copy_n(x, n, to);
    } else {
      for (size_t i = 0; i < n; ++i) to[i] = (word >> i & 1) ? x[i] : -kInf;
    }
  }
}

// 53 random bits as a double in [0, 1): the draw of one output position of one sequence.
double uniform(const SamplingRow& row, uint64_t position) {
  const auto bits = philox(
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), row.stream, 0}, row.seed);
  const uint64_t word = (static_cast<uint64_t>(bits[0]) << 32 | bits[1]) >> 11;
  return static_cast<double>(word) * 0x1p-53;
}

}  // namespace

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

Sample RowSampler::sample(const float* logits, const SamplingTask& task) {
  const SamplingRow& row = *task.row;
  Sample sample;
  const Peak raw = find_peak(logits, vocab_);
  if (!raw.finite) {
    sample.status = SampleStatus::kNotFinite;
    return sample;
  }
  const uint64_t position = task.num_tokens - static_cast<size_t>(row.prompt_len);
  const bool hold_stops = static_cast<int64_t>(position) < row.min_tokens && !row.stop_ids.empty();
  const float* allowed = apply_rules(logits, task, hold_stops);
  Peak peak = raw;
  if (allowed != nullptr && allowed != logits) {
    peak = find_peak(allowed, vocab_);
    if (peak.id < 0 && hold_stops &&
        task.mask != nullptr) {  // the grammar is at its end: that outranks min_tokens
      allowed = apply_rules(logits, task, false);
      peak = find_peak(allowed, vocab_);
    }
  }
  if (allowed == nullptr || peak.id < 0) {
    sample.status = allowed == nullptr ? SampleStatus::kBadToken : SampleStatus::kNothingAllowed;
    return sample;
  }
  const bool greedy = row.temperature == 0.0f || row.top_k == 1;
  sample.token = greedy ? peak.id : draw(allowed, peak.value, row, uniform(row, position));
  if (row.num_logprobs >= 0)
    report_logprobs(logits, raw.value, row.num_logprobs, sample, task.top_ids, task.top_logprobs);
  return sample;
}

void RowSampler::score(const float* logits, int32_t num_logprobs, Sample& sample, int32_t* top_ids,
                       float* top_logprobs) {
  const Peak peak = find_peak(logits, vocab_);
  if (!peak.finite) {
    sample.status = SampleStatus::kNotFinite;
  } else if (static_cast<uint32_t>(sample.token) >= vocab_) {
    sample.status = SampleStatus::kBadToken;
  } else {
    report_logprobs(logits, peak.value, num_logprobs, sample, top_ids, top_logprobs);
  }
}

// Masks, bias and penalties. Returns the logits themselves when no rule applies, else an edited copy; null
// for a token that is not in the vocabulary.
const float* RowSampler::apply_rules(const float* logits, const SamplingTask& task, bool hold_stops) {
  const SamplingRow& row = *task.row;
  const int32_t* tokens = task.tokens;
  const size_t num_tokens = task.num_tokens;
  const size_t prompt_len = static_cast<size_t>(row.prompt_len);
  const auto known = [&](int32_t id) { return static_cast<uint32_t>(id) < vocab_; };
  const bool repetition = row.repetition_penalty != 1.0f;
  const bool counting = row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
  const bool masking = task.mask != nullptr || !row.allowed.empty() || !row.bad_words.empty();
  if (!repetition && !counting && !hold_stops && !masking && row.logit_bias.empty()) return logits;

  edited_.resize(vocab_);
  if (task.mask != nullptr) {
    select(logits, task.mask, edited_.data(), vocab_);
  } else {
    std::copy_n(logits, vocab_, edited_.data());
  }
  if (!row.allowed.empty()) select(edited_.data(), row.allowed.data(), edited_.data(), vocab_);
  if (!forbid_bad_words(task)) return nullptr;
  for (const auto& [id, bias] : row.logit_bias) {
    if (!known(id)) return nullptr;
    edited_[id] += bias;
  }
  if (hold_stops) {
    for (int32_t id : row.stop_ids) {
      if (!known(id)) return nullptr;
      edited_[id] = -kInf;
    }
  }
  if (!repetition && !counting) return edited_.data();

  output_counts_.resize(vocab_);
  seen_.resize(vocab_);
  touched_.clear();
  const size_t first = repetition ? 0 : prompt_len;
  if (!std::all_of(tokens + first, tokens + num_tokens, known)) return nullptr;
  for (size_t i = first; i < num_tokens; ++i) {
    if (!std::exchange(seen_[tokens[i]], 1)) touched_.push_back(tokens[i]);
    output_counts_[tokens[i]] += i >= prompt_len;
  }
  for (int32_t id : touched_) {
    float& logit = edited_[id];
    if (repetition) logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    const int32_t count = std::exchange(output_counts_[id], 0);
    logit -= row.frequency_penalty * static_cast<float>(count) + (count > 0 ? row.presence_penalty : 0.0f);
    seen_[id] = 0;
  }
  return edited_.data();
}

// Of each bad word whose other tokens have just come, the last; false for an id out of the vocabulary. A word
// begins in the output: what the prompt says is the client's own.
bool RowSampler::forbid_bad_words(const SamplingTask& task) {
  const int32_t* output = task.tokens + task.row->prompt_len;
  const int32_t* end = task.tokens + task.num_tokens;
  for (const std::vector<int32_t>& word : task.row->bad_words) {
    if (static_cast<uint32_t>(word.back()) >= vocab_) return false;
    const ptrdiff_t before = static_cast<ptrdiff_t>(word.size()) - 1;
    if (end - output >= before && std::equal(word.begin(), word.end() - 1, end - before))
      edited_[word.back()] = -kInf;
  }
  return true;
}

// A draw from softmax((logits) / temperature) after min-p, top-k, top-p and typical-p.
// Candidates stay in the order of their ids: the token drawn does not depend on how they were found.
int32_t RowSampler::draw(const float* logits, float peak, const SamplingRow& row, double u) {
  const float inverse = 1.0f / row.temperature;
  double total = 0.0;  // of the tokens that min-p and top-k leave
  candidates_.clear();
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < vocab_) {
    select_top(logits, static_cast<size_t>(row.top_k));
    for (const Scored& top : ranking_) {
      const float weight = exp_negative((top.score - peak) * inverse);
      if (weight >= row.min_p) candidates_.push_back({weight, top.id});
    }
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Scored& a, const Scored& b) { return a.id < b.id; });
    for (const Scored& c : candidates_) total += c.score;
  } else {
    weigh(logits, peak, inverse, row.min_p);
    if (row.top_p >= 1.0f && row.min_p <= 0.0f && row.typical_p >= 1.0f) return draw_from_all(u);
    // All tokens lighter than this weigh less than 1 - top_p together, so none of them is in the nucleus.
    total = std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
    const double hopeless = 0.999 * (1.0 - row.top_p) * total / static_cast<double>(vocab_);
    const float cut = std::max(row.min_p, static_cast<float>(hopeless));
    for (size_t start = 0; start < vocab_; start += kLanes * 4) {
      const size_t end = std::min(vocab_, start + kLanes * 4);
      if (max_of(&weights_[start], end - start) < cut) continue;
      for (size_t i = start; i < end; ++i)
        if (weights_[i] >= cut) candidates_.push_back({weights_[i], static_cast<int32_t>(i)});
    }
  }
  if (row.top_p < 1.0f) keep_nucleus(row.top_p * total);
  if (row.typical_p < 1.0f) keep_typical(row.typical_p);

  double kept = 0.0, sum = 0.0;
  for (const Scored& c : candidates_) kept += c.score;
  int32_t last = candidates_.front().id;
  for (const Scored& c : candidates_) {
    if (c.score <= 0.0f) continue;
    last = c.id;
    sum += c.score;
    if (sum > u * kept) break;
  }
  return last;
}

int32_t RowSampler::draw_from_all(double u) const {
  const double target = u * std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
  size_t block = 0;
  double sum = 0.0;
  while (block + 1 < block_sums_.size() && sum + block_sums_[block] <= target) sum += block_sums_[block++];
  // Rounding may leave the target just beyond the block (or beyond all): then its last token that has a
  // weight.
  while (block > 0 && block_sums_[block] <= 0.0) --block;
  size_t last = block * kBlock;
  for (size_t i = block * kBlock; i < std::min(vocab_, (block + 1) * kBlock); ++i) {
    if (weights_[i] <= 0.0f) continue;
    last = i;
    sum += weights_[i];
    if (sum > target) break;
  }
  return static_cast<int32_t>(last);
}

// Keeps the likeliest candidates that together hold top_p of the weight: the fewest that do, and at least
// one. A histogram over the leading bits of the weights finds the bucket in which the last of them lies, then
// a weighted quickselect finds it there, halving the range with each step.
void RowSampler::keep_nucleus(double target) {
  const auto bucket = [](const Scored& c) { return std::bit_cast<uint32_t>(c.score) >> kBucketShift; };
  buckets_.assign(kBuckets, 0.0);
  for (const Scored& c : candidates_) buckets_[bucket(c)] += c.score;
  double sum = 0.0;  // of the candidates known to be kept
  size_t edge = kBuckets - 1;
  while (edge > 0 && sum + buckets_[edge] < target) sum += buckets_[edge--];

  ranking_.clear();
  for (const Scored& c : candidates_)
    if (bucket(c) == edge) ranking_.push_back(c);
  if (ranking_.empty()) return;  // rounding: not even all weigh as much as the target
  size_t low = 0, high = ranking_.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(ranking_.begin() + low, ranking_.begin() + middle, ranking_.begin() + high, before);
    double upper = 0.0;
    for (size_t i = low; i < middle; ++i) upper += ranking_[i].score;
    if (sum + upper >= target) {
      high = middle;
    } else {
      sum += upper;
      low = middle;
    }
  }
  const Scored last = ranking_[low];
  std::erase_if(candidates_, [&](const Scored& c) { return before(last, c); });
}

// Keeps the candidates whose surprise is nearest to the expected one (Meister et al., "Locally typical
// sampling", 2022): the fewest that together hold typical_p of the candidates' weight, and at least one. Of
// two equally near the likelier counts as nearer, then the one with the lower id.
void RowSampler::keep_typical(double typical_p) {
  std::erase_if(candidates_, [](const Scored& c) { return c.score <= 0.0f; });
  double total = 0.0, weighted = 0.0;
  for (const Scored& c : candidates_) {
    total += c.score;
    weighted += c.score * std::log(static_cast<double>(c.score));
  }
  // With p = score / total the entropy is log(total) - weighted / total, and log(total) cancels below.
  const double expected = -weighted / total;
  const auto distance = [&](const Scored& c) {
    return std::abs(-std::log(static_cast<double>(c.score)) - expected);
  };
  std::vector<std::pair<double, Scored>> order;  // a rare rule: it may sort
  for (const Scored& c : candidates_) order.push_back({distance(c), c});
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first < b.first : before(a.second, b.second);
  });
  double sum = 0.0;
  size_t kept = 0;
  while (kept < order.size() && (kept == 0 || sum < typical_p * total)) sum += order[kept++].second.score;
  candidates_.clear();
  for (size_t i = 0; i < kept; ++i) candidates_.push_back(order[i].second);
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Scored& a, const Scored& b) { return a.id < b.id; });
}

// The k best into ranking_, in no order (fewer when the rest is masked). One pass: whatever does not beat the
// k-th best so far is skipped, a vector at a time.
void RowSampler::select_top(const float* logits, size_t k) {
  const size_t capacity = 2 * k + 256;
  float threshold = -kInf;
  ranking_.clear();
  const auto shrink = [&] {
    std::nth_element(ranking_.begin(), ranking_.begin() + (k - 1), ranking_.end(), before);
    ranking_.resize(k);
    threshold = ranking_[k - 1].score;
  };
  for (size_t start = 0; start < vocab_; start += kLanes * 4) {
    const size_t end = std::min(vocab_, start + kLanes * 4);
    if (max_of(logits + start, end - start) <= threshold) continue;
    for (size_t i = start; i < end; ++i) {
      if (logits[i] > threshold) ranking_.push_back({logits[i], static_cast<int32_t>(i)});
    }
    if (ranking_.size() >= capacity) shrink();
  }
  if (ranking_.size() > k) shrink();
}

// weights_ = exp((logits - peak) * inverse_temperature); block_sums_ of those that are at least `floor`.
void RowSampler::weigh(const float* logits, float peak, float inverse_temperature, float floor) {
  weights_.resize(vocab_);
  block_sums_.clear();
  for (size_t start = 0; start < vocab_; start += kBlock) {
    const size_t n = std::min(kBlock, vocab_ - start);
    const float* x = logits + start;
    float* w = weights_.data() + start;
    for (size_t i = 0; i < n; ++i) w[i] = exp_negative((x[i] - peak) * inverse_temperature);
    float lanes[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (size_t j = 0; j < kLanes; ++j) lanes[j] += w[i + j] >= floor ? w[i + j] : 0.0f;
    for (; i < n; ++i) lanes[0] += w[i] >= floor ? w[i] : 0.0f;
    block_sums_.push_back(std::accumulate(lanes, lanes + kLanes, 0.0));
  }
}

void RowSampler::report_logprobs(const float* logits, float peak, int32_t num_logprobs, Sample& sample,
                                 int32_t* top_ids, float* top_logprobs) {
  weigh(logits, peak, 1.0f, 0.0f);
  const double sum = std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
  const double log_sum = static_cast<double>(peak) + std::log(sum);
  const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - log_sum); };

  const float chosen = logits[sample.token];
  sample.logprob = logprob(chosen);
  int32_t higher = 0;
  for (size_t i = 0; i < vocab_; ++i) higher += logits[i] > chosen;
  for (int32_t i = 0; i < sample.token; ++i) higher += logits[i] == chosen;
  sample.rank = 1 + higher;

  if (num_logprobs <= 0) return;
  const size_t wanted = static_cast<size_t>(num_logprobs);
  select_top(logits, std::min(wanted, vocab_));
  std::sort(ranking_.begin(), ranking_.end(), before);
  for (size_t i = 0; i < wanted; ++i) {
    top_ids[i] = i < ranking_.size() ? ranking_[i].id : -1;
    top_logprobs[i] = i < ranking_.size() ? logprob(ranking_[i].score) : -kInf;
  }
}

void Sampler::sample(const float* logits, std::vector<SamplingTask>& tasks) {
  share_out(tasks.size(), [&](RowSampler& sampler, size_t i) {
    tasks[i].sample = sampler.sample(logits + i * vocab_, tasks[i]);
  });
}

void Sampler::score(const float* logits, int32_t num_logprobs, std::vector<ScoringTask>& tasks) {
  share_out(tasks.size(), [&](RowSampler& sampler, size_t i) {
    ScoringTask& t = tasks[i];
    sampler.score(logits + i * vocab_, num_logprobs, t.sample, t.top_ids, t.top_logprobs);
  });
}

template <typename Work>
void Sampler::share_out(size_t count, const Work& work) {
  std::atomic<size_t> next{0};
  const auto take = [&](RowSampler& sampler) {
    for (size_t i = next++; i < count; i = next++) work(sampler, i);
  };
  std::vector<std::jthread> helpers;  // join themselves, also when one more cannot start
  const size_t workers = std::min(samplers_.size(), count / kRowsAThread);
  for (size_t i = 1; i < workers; ++i) helpers.emplace_back(take, std::ref(samplers_[i]));
  take(samplers_[0]);
}

}  // namespace llmb
