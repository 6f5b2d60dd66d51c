#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llmb {
namespace {

using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

MatrixPart part_of(const Matrix& m) {
  const auto is = [&](nb::dlpack::dtype d) { return m.dtype() == d; };
  if (is(nb::dtype<float>())) return {m.data(), m.shape(0), Source::kF32};
  if (is(nb::dtype<uint16_t>())) return {m.data(), m.shape(0), Source::kBF16};  // its bits
  if (is({static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})) return {m.data(), m.shape(0), Source::kF16};
  throw nb::type_error("weights are float32, float16, or bfloat16 seen as uint16");
}

// A numpy array that owns memory of C++; 64-byte aligned.
template <typename T, size_t N>
auto owned(const size_t (&shape)[N]) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  T* data = static_cast<T*>(operator new(std::max<size_t>(n, 1) * sizeof(T), std::align_val_t(64)));
  nb::capsule owner(data, [](void* p) noexcept { operator delete(p, std::align_val_t(64)); });
  return nb::ndarray<nb::numpy, T, nb::ndim<N>>(data, N, shape, owner);
}

}  // namespace

void bind_pack(nb::module_& m) {
  m.def(
      "packed_bytes",
      [](const std::string& format, size_t rows, size_t cols) { return matrix_bytes(format_of(format), rows, cols); },
      "format"_a, "rows"_a, "cols"_a, "Size of a packed matrix [rows][cols], in bytes.");
  m.def(
      "pack_matrix",
      [](const std::vector<Matrix>& matrices, const std::string& format, bool interleave, int threads) {
        if (matrices.empty()) throw nb::value_error("no parts");
        std::vector<MatrixPart> parts;
        size_t rows = 0;
        const size_t cols = matrices[0].shape(1);
        for (const Matrix& part : matrices) {
          if (part.shape(1) != cols) throw nb::value_error("parts differ in their columns");
          parts.push_back(part_of(part));
          rows += interleave ? round_up(part.shape(0), kBlockRows) : part.shape(0);
          if (interleave && part.shape(0) != matrices[0].shape(0)) throw nb::value_error("interleaved parts differ in rows");
        }
        const Format f = format_of(format);
        auto out = owned<uint8_t>({matrix_bytes(f, rows, cols)});
        {
          nb::gil_scoped_release release;
          pack_matrix(f, parts, interleave, cols, out.data(), threads);
        }
        return out;
      },
      "parts"_a, "format"_a, "interleave"_a = false, "threads"_a = 1,
      "Parts [rows][cols] stacked (or their blocks of 16 rows in turn) as packed bytes (csrc/layout.h).\n\n"
      "Raises ValueError when a weight is not a finite number.");
  m.def(
      "unpack_matrix",
      [](const Bytes& packed, const std::string& format, size_t rows, size_t cols) {
        const Format f = format_of(format);
        if (packed.size() != matrix_bytes(f, rows, cols)) throw nb::value_error("wrong size for its shape");
        auto out = owned<float>({rows, cols});
        unpack_matrix(f, packed.data(), rows, cols, out.data());
        return out;
      },
      "packed"_a, "format"_a, "rows"_a, "cols"_a, "The weights that packed bytes stand for, float32 [rows][cols].");
}

}  // namespace llmb
