// The Python face of the native core: shapes and types are checked here, the arithmetic is elsewhere.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "plan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llmb {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

using Part = std::tuple<Bytes, std::string, size_t, size_t, std::optional<Floats>>;

void require(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}

Weight weight_of(const Bytes& data, const std::string& format, size_t rows, size_t cols) {
  const Weight w{format_of(format), rows, cols, data.data()};
  require(data.size() == matrix_bytes(w.format, rows, cols),
          "packed weight has the wrong size for its shape");
  require(reinterpret_cast<uintptr_t>(data.data()) % 4 == 0, "packed weight is not aligned");
  return w;
}

Norm norm_of(const std::optional<Floats>& weight, float eps, size_t width) {
  if (!weight) return {};
  require(weight->size() == width, "norm weight has the wrong size");
  return {weight->data(), eps};
}

Epilogue epilogue_of(const std::string& name) {
  if (name == "store") return Epilogue::kStore;
  if (name == "add") return Epilogue::kAdd;
  if (name == "silu_mul") return Epilogue::kSiluMul;
  throw nb::value_error("unknown epilogue");
}

CacheFormat cache_format_of(const std::string& name) {
  if (name == "float32") return CacheFormat::kF32;
  if (name == "int16") return CacheFormat::kInt16;
  if (name == "int8") return CacheFormat::kInt8;
  throw nb::value_error("unknown cache format");
}

void bind_plan(nb::module_& m) {
  m.def(
      "cache_block_bytes",
      [](const std::string& format, size_t layers, size_t kv_heads, size_t head_dim, size_t block_size) {
        return cache_block_bytes({cache_format_of(format), layers, 0, block_size}, {0, kv_heads, head_dim});
      },
      "cache_format"_a, "layers"_a, "kv_heads"_a, "head_dim"_a, "block_size"_a,
      "Bytes of the keys and values of block_size positions in all layers.");
  nb::class_<Plan>(m, "Plan",
                   "A model as a list of fused operations, run for one step in one call (csrc/plan.h).")
      .def(
          "__init__",
          [](Plan* self, int threads, const std::string& isa, size_t max_tokens, size_t heads,
             size_t kv_heads, size_t head_dim, const std::string& cache_format, size_t layers,
             size_t num_blocks, size_t block_size) {
            require(threads >= 1 && threads <= 1024, "threads must be between 1 and 1024");
            require(max_tokens >= 1 && max_tokens <= (1u << 20), "max_tokens must be between 1 and 1048576");
            new (self) Plan(threads, isa, max_tokens, {heads, kv_heads, head_dim},
                            {cache_format_of(cache_format), layers, num_blocks, block_size});
          },
          "threads"_a, "isa"_a, "max_tokens"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "cache_format"_a,
          "layers"_a, "num_blocks"_a, "block_size"_a)
      .def("buffer", &Plan::buffer, "width"_a)
      .def(
          "embed",
          [](Plan& p, const Bytes& table, const std::string& format, size_t rows, size_t width, int out) {
            const Format f = format_of(format);
            require(f == Format::kF32 || f == Format::kBF16, "embedding tables are float32 or bfloat16");
            require(table.size() == rows * width * (f == Format::kF32 ? 4 : 2),
                    "embedding table has the wrong size");
            p.embed(table.data(), f, rows, width, out);
          },
          "table"_a, "format"_a, "rows"_a, "width"_a, "out"_a, nb::keep_alive<1, 2>())
      .def(
          "linear",
          [](Plan& p, int in, std::optional<Floats> norm, float eps, const std::vector<Part>& parts,
             const std::string& epilogue, int out) {
            std::vector<LinearPart> linear_parts;
            for (const auto& [weight, format, rows, cols, bias] : parts) {
              require(!bias || bias->size() == round_up(rows, kBlockRows), "bias has the wrong size");
              linear_parts.push_back({weight_of(weight, format, rows, cols), bias ? bias->data() : nullptr});
            }
            require(!parts.empty(), "a linear needs a weight");
            require(out >= 0, "no such buffer");
            p.linear(in, norm_of(norm, eps, linear_parts[0].weight.cols), linear_parts, epilogue_of(epilogue),
                     out);
          },
          "input"_a, "norm"_a.none(), "eps"_a, "parts"_a, "epilogue"_a, "out"_a, nb::keep_alive<1, 3>(),
          nb::keep_alive<1, 5>(),
          "parts: (packed weight, format, rows, cols, bias or None), side by side in the columns of out.")
      .def(
          "attention",
          [](Plan& p, int qkv, size_t layer, std::optional<Floats> q_norm, std::optional<Floats> k_norm,
             float eps, size_t head_dim, float scale, int out, std::optional<Floats> k_centre) {
            require(head_dim == p.head_dim(), "head_dim differs from the plan's");
            require(!k_centre || k_centre->size() == p.kv_heads() * head_dim, "k_centre has the wrong size");
            p.attention(qkv, layer, norm_of(q_norm, eps, head_dim), norm_of(k_norm, eps, head_dim),
                        k_centre ? k_centre->data() : nullptr, scale, out);
          },
          "qkv"_a, "layer"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "head_dim"_a, "scale"_a, "out"_a,
          "k_centre"_a.none() = nb::none(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
          nb::keep_alive<1, 10>())
      .def(
          "logits",
          [](Plan& p, int in, std::optional<Floats> norm, float eps, const Bytes& weight,
             const std::string& format, size_t rows,
             size_t cols) { p.logits(in, norm_of(norm, eps, cols), weight_of(weight, format, rows, cols)); },
          "input"_a, "norm"_a.none(), "eps"_a, "weight"_a, "format"_a, "rows"_a, "cols"_a,
          nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>())
      .def(
          "run",
          [](Plan& p, const Ints& token_ids, const Ints& seq_starts, const Ints& context_lens,
             const Ints2& block_tables, const Ints& logit_rows, const Floats2& cos, const Floats2& sin) {
            Step s;
            s.num_tokens = token_ids.size();
            s.num_seqs = context_lens.size();
            s.num_rows = logit_rows.size();
            s.table_width = block_tables.shape(1);
            require(seq_starts.size() == s.num_seqs + 1 && block_tables.shape(0) == s.num_seqs,
                    "seq_starts, context_lens and block_tables disagree");
            require(cos.shape(0) == s.num_tokens && sin.shape(0) == s.num_tokens &&
                        cos.shape(1) == sin.shape(1) && cos.shape(1) * 2 == p.head_dim(),
                    "cos and sin must be [tokens][head_dim / 2]");
            s.token_ids = token_ids.data();
            s.seq_starts = seq_starts.data();
            s.context_lens = context_lens.data();
            s.block_tables = block_tables.data();
            s.logit_rows = logit_rows.data();
            s.cos = cos.data();
            s.sin = sin.data();
            const float* logits;
            {
              nb::gil_scoped_release release;
              logits = p.run(s);
            }
            const size_t shape[2] = {s.num_rows, p.vocab_size()};
            return nb::ndarray<nb::numpy, float, nb::ndim<2>>(const_cast<float*>(logits), 2, shape,
                                                              nb::find(p));
          },
          "token_ids"_a, "seq_starts"_a, "context_lens"_a, "block_tables"_a, "logit_rows"_a, "cos"_a, "sin"_a,
          "Logits [rows][vocab], valid until the next call.")
      .def_prop_ro("vocab_size", &Plan::vocab_size)
      .def_prop_ro("cache_bytes", &Plan::cache_bytes)
      .def_prop_ro("workspace_bytes", &Plan::workspace_bytes)
      .def_prop_ro("threads", &Plan::num_threads)
      .def_prop_ro("isa", &Plan::isa);
}

}  // namespace
}  // namespace llmb

NB_MODULE(_native, m) {
  m.doc() = "Kernels, threads and the plan executor of the built-in engine.";
  m.def("available_isas", &llmb::available_isas,
        "Instruction sets with kernels that this processor runs, best first.");
  m.attr("GROUP") = llmb::kGroup;
  m.attr("INT4_CODEBOOK") = std::vector<int>(std::begin(llmb::kInt4Codebook), std::end(llmb::kInt4Codebook));
  llmb::bind_plan(m);
  llmb::bind_calibrate(m);
  llmb::bind_pack(m);
  llmb::bind_probe(m);
  llmb::bind_sampler(m);
}
