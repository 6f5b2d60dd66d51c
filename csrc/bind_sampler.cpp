// The sampler for Python: SamplingRow and sample().
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llmb {
namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

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

nb::tuple sample(Sampler& sampler, const Logits& logits, const nb::list& rows, const nb::list& tokens) {
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
    tasks.push_back({row, arrays[i].data(), arrays[i].size(), nullptr, nullptr, {}});
    num_logprobs = std::max(num_logprobs, row->num_logprobs);
  }
  const size_t width = static_cast<size_t>(std::max(num_logprobs, 0));

  Column<int32_t> ids(count, 1), ranks(count, 1), top_ids(count, width);
  Column<float> logprobs(count, 1), top_logprobs(count, width);
  Column<uint8_t> status(count, 1);
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i) {
      tasks[i].top_ids = top_ids.row(i);
      tasks[i].top_logprobs = top_logprobs.row(i);
    }
    sampler.sample(logits.data(), tasks);
    for (size_t i = 0; i < count; ++i) {
      const Sample& s = tasks[i].sample;
      *ids.row(i) = s.token;
      *ranks.row(i) = s.rank;
      *logprobs.row(i) = s.logprob;
      *status.row(i) = static_cast<uint8_t>(s.status);
    }
  }
  if (num_logprobs < 0) return nb::make_tuple(ids.numpy(), status.numpy(), nb::none());
  return nb::make_tuple(
      ids.numpy(), status.numpy(),
      nb::make_tuple(logprobs.numpy(), ranks.numpy(), top_ids.numpy(false), top_logprobs.numpy(false)));
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<SamplingRow>(m, "SamplingRow", "What one sequence asks of the sampler.")
      .def(
          "__init__",
          [](SamplingRow* self, float temperature, int32_t top_k, float top_p, float min_p,
             float repetition_penalty, float presence_penalty, float frequency_penalty, uint64_t seed,
             uint32_t stream, int64_t prompt_len, int64_t min_tokens, int32_t num_logprobs,
             std::vector<int32_t> stop_ids, std::vector<std::pair<int32_t, float>> logit_bias) {
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
                                   std::move(logit_bias)};
          },
          nb::kw_only(), "temperature"_a = 1.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f,
          "repetition_penalty"_a = 1.0f, "presence_penalty"_a = 0.0f, "frequency_penalty"_a = 0.0f,
          "seed"_a = 0, "stream"_a = 0, "prompt_len"_a = 0, "min_tokens"_a = 0, "num_logprobs"_a = -1,
          "stop_ids"_a = std::vector<int32_t>{}, "logit_bias"_a = std::vector<std::pair<int32_t, float>>{});

  nb::class_<Sampler>(m, "Sampler", "Samples batches of logits; for one thread at a time.")
      .def(nb::init<size_t, size_t>(), "vocab_size"_a, "threads"_a = 1)
      .def("sample", &sample, "logits"_a.noconvert(), "rows"_a, "tokens"_a,
           "The next token of every row of logits [R, vocab_size] float32, given R SamplingRows and R int32 "
           "arrays of\n"
           "the tokens so far (prompt and output). Returns (tokens [R] int32, status [R] uint8, logprobs).\n"
           "Status: 0 fine, 1 NaN or infinite logits, 2 every token is masked, 3 a token outside the "
           "vocabulary.\n"
           "logprobs is None unless a row asks for them, else (logprob [R] float32, rank [R] int32,\n"
           "top_ids [R, N] int32, top_logprobs [R, N] float32), N the most that a row asks for.");

  m.def("philox", &philox, "counter"_a, "key"_a, "The sampler's random bits, for tests: Philox 4x32-10.");
}

}  // namespace llmb
