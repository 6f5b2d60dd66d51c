// The sampler for Python: SamplingRow and sample().
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llmb {
namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A numpy array that owns its memory.
template <typename T>
struct Column {
  std::unique_ptr<T[]> data;
  size_t rows, cols;

  Column(size_t rows, size_t cols) : data(new T[rows * cols]()), rows(rows), cols(cols) {}
  T* row(size_t i) { return data.get() + i * cols; }

  nb::object numpy(bool flat = true) {
    T* p = data.release();
    nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<T*>(q); });
    const size_t shape[2] = {rows, cols};
    return nb::cast(nb::ndarray<nb::numpy, T>(p, flat ? 1 : 2, shape, owner));
  }
};

size_t mask_words(size_t vocab) { return (vocab + 31) / 32; }

// What is known of tokens' log-probabilities, as numpy arrays.
struct Logprobs {
  Column<float> logprobs;
  Column<int32_t> ranks, top_ids;
  Column<float> top_logprobs;

  Logprobs(size_t rows, size_t width)
      : logprobs(rows, 1), ranks(rows, 1), top_ids(rows, width), top_logprobs(rows, width) {}

  void set(size_t i, const Sample& s) {
    *logprobs.row(i) = s.logprob;
    *ranks.row(i) = s.rank;
  }
  nb::tuple numpy() {
    return nb::make_tuple(logprobs.numpy(), ranks.numpy(), top_ids.numpy(false), top_logprobs.numpy(false));
  }
};

nb::tuple score(Sampler& sampler, const Logits& logits, const Tokens& tokens, int32_t num_logprobs) {
  const size_t count = logits.shape(0);
  if (logits.shape(1) != sampler.vocab()) throw nb::value_error("logits: the width is not the vocabulary's");
  if (tokens.size() != count || num_logprobs < 0)
    throw nb::value_error("score() takes one token for each row of logits, and num_logprobs from 0");
  Logprobs extra(count, static_cast<size_t>(num_logprobs));
  Column<uint8_t> status(count, 1);
  {
    nb::gil_scoped_release release;
    std::vector<ScoringTask> tasks(count);
    for (size_t i = 0; i < count; ++i) {
      tasks[i] = {extra.top_ids.row(i), extra.top_logprobs.row(i), {}};
      tasks[i].sample.token = tokens.data()[i];
    }
    sampler.score(logits.data(), num_logprobs, tasks);
    for (size_t i = 0; i < count; ++i) {
      extra.set(i, tasks[i].sample);
      *status.row(i) = static_cast<uint8_t>(tasks[i].sample.status);
    }
  }
  return nb::make_tuple(status.numpy(), extra.numpy());
}

// `masks` belong to the rows that `masked` names, in that order.
nb::tuple sample(Sampler& sampler, const Logits& logits, const nb::list& rows, const nb::list& tokens,
                 std::optional<Masks> masks, const std::vector<size_t>& masked) {
  const size_t count = logits.shape(0);
  if (logits.shape(1) != sampler.vocab()) throw nb::value_error("logits: the width is not the vocabulary's");
  if (nb::len(rows) != count || nb::len(tokens) != count)
    throw nb::value_error("sample() takes one SamplingRow and one token array for each row of logits");

  std::vector<SamplingTask> tasks;
  std::vector<Tokens> arrays;  // keeps them alive while the GIL is released
  int32_t num_logprobs = -1;
  for (size_t i = 0; i < count; ++i) {
    const SamplingRow* row = nb::cast<const SamplingRow*>(rows[i]);
    arrays.push_back(nb::cast<Tokens>(tokens[i]));
    if (arrays[i].size() < static_cast<size_t>(row->prompt_len))
      throw nb::value_error("tokens: shorter than the prompt");
    tasks.push_back({row, arrays[i].data(), arrays[i].size(), nullptr, nullptr, nullptr, {}});
    num_logprobs = std::max(num_logprobs, row->num_logprobs);
    if (!row->allowed.empty() && row->allowed.size() < mask_words(sampler.vocab()))
      throw nb::value_error("allowed: narrower than the vocabulary");
  }
  if ((masks ? masks->shape(0) : 0) != masked.size())
    throw nb::value_error("sample() takes one mask for each row that is masked");
  if (masks && masks->shape(1) < mask_words(sampler.vocab()))
    throw nb::value_error("masks: narrower than the vocabulary");
  for (size_t i = 0; i < masked.size(); ++i) {
    if (masked[i] >= count) throw nb::value_error("masked: no such row");
    tasks[masked[i]].mask = reinterpret_cast<const uint32_t*>(masks->data() + i * masks->shape(1));
  }
  const size_t width = static_cast<size_t>(std::max(num_logprobs, 0));

  Column<int32_t> ids(count, 1);
  Column<uint8_t> status(count, 1);
  Logprobs extra(count, width);
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i) {
      tasks[i].top_ids = extra.top_ids.row(i);
      tasks[i].top_logprobs = extra.top_logprobs.row(i);
    }
    sampler.sample(logits.data(), tasks);
    for (size_t i = 0; i < count; ++i) {
      const Sample& s = tasks[i].sample;
      *ids.row(i) = s.token;
      extra.set(i, s);
      *status.row(i) = static_cast<uint8_t>(s.status);
    }
  }
  if (num_logprobs < 0) return nb::make_tuple(ids.numpy(), status.numpy(), nb::none());
  return nb::make_tuple(ids.numpy(), status.numpy(), extra.numpy());
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<SamplingRow>(m, "SamplingRow", "What one sequence asks of the sampler.")
      .def(
          "__init__",
          [](SamplingRow* self, float temperature, int32_t top_k, float top_p, float min_p,
             float repetition_penalty, float presence_penalty, float frequency_penalty, uint64_t seed,
             uint32_t stream, int64_t prompt_len, int64_t min_tokens, int32_t num_logprobs,
             std::vector<int32_t> stop_ids, std::vector<std::pair<int32_t, float>> logit_bias,
             float typical_p, std::vector<uint32_t> allowed, std::vector<std::vector<int32_t>> bad_words) {
            for (const std::vector<int32_t>& word : bad_words)
              if (word.empty()) throw nb::value_error("bad_words: one without tokens");
            new (self) SamplingRow{temperature,
                                   top_k,
                                   top_p,
                                   min_p,
                                   repetition_penalty,
                                   presence_penalty,
                                   frequency_penalty,
                                   seed,
                                   stream,
                                   prompt_len,
                                   min_tokens,
                                   num_logprobs,
                                   std::move(stop_ids),
                                   std::move(logit_bias),
                                   typical_p,
                                   std::move(allowed),
                                   std::move(bad_words)};
          },
          nb::kw_only(), "temperature"_a = 1.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f,
          "repetition_penalty"_a = 1.0f, "presence_penalty"_a = 0.0f, "frequency_penalty"_a = 0.0f,
          "seed"_a = 0, "stream"_a = 0, "prompt_len"_a = 0, "min_tokens"_a = 0, "num_logprobs"_a = -1,
          "stop_ids"_a = std::vector<int32_t>{}, "logit_bias"_a = std::vector<std::pair<int32_t, float>>{},
          "typical_p"_a = 1.0f, "allowed"_a = std::vector<uint32_t>{},
          "bad_words"_a = std::vector<std::vector<int32_t>>{});

  nb::class_<Sampler>(m, "Sampler", "Samples batches of logits; for one thread at a time.")
      .def(nb::init<size_t, size_t>(), "vocab_size"_a, "threads"_a = 1)
      .def("sample", &sample, "logits"_a.noconvert(), "rows"_a, "tokens"_a, "masks"_a.none() = nb::none(),
           "masked"_a = std::vector<size_t>{},
           "The next token of every row of logits [R, vocab_size] float32, given R SamplingRows and R int32 "
           "arrays of\n"
           "the tokens so far (prompt and output). Returns (tokens [R] int32, status [R] uint8, logprobs).\n"
           "Status: 0 fine, 1 NaN or infinite logits, 2 every token is masked, 3 a token outside the "
           "vocabulary.\n"
           "logprobs is None unless a row asks for them, else (logprob [R] float32, rank [R] int32,\n"
           "top_ids [R, N] int32, top_logprobs [R, N] float32), N the most that a row asks for.\n"
           "masks [M, words] int32 are of the rows that `masked` lists: bit i % 32 of word i // 32 says "
           "whether\n"
           "token i may be sampled.")
      .def("score", &score, "logits"_a.noconvert(), "tokens"_a, "num_logprobs"_a,
           "What logits [R, vocab_size] say of tokens [R] int32: (status [R] uint8, logprobs), both as of "
           "sample().");

  m.def("philox", &philox, "counter"_a, "key"_a, "The sampler's random bits, for tests: Philox 4x32-10.");
}

}  // namespace llmb
