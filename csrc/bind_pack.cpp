// Python's view of the packer: pack_matrix, unpack_rows, packed_bytes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "pack.h"

namespace nb = nanobind;

namespace llmb {
namespace {

using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Source source_of(const Matrix& matrix) {
  if (matrix.dtype() == nb::dtype<float>()) return Source::kF32;
  if (matrix.dtype() == nb::dtype<uint16_t>()) return Source::kBF16;
  const nb::dlpack::dtype t = matrix.dtype();
  if (t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && t.bits == 16) return Source::kF16;
  throw std::invalid_argument("a matrix must be float32, float16, or uint16 (the bits of bfloat16)");
}

// A 1-D or 2-D NumPy array of `size` elements that owns its memory.
template <typename T>
std::pair<T*, nb::capsule> allocate(size_t size) {
  auto data = std::make_unique_for_overwrite<T[]>(size);
  nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return {data.release(), owner};
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> pack(const std::vector<Matrix>& matrices,
                                                  const std::string& format_name, bool interleave,
                                                  int threads) {
  const Format format = format_of(format_name);
  if (matrices.empty()) throw std::invalid_argument("no matrix to pack");
  const size_t cols = matrices[0].shape(1);
  std::vector<MatrixPart> parts;
  for (const Matrix& matrix : matrices) {
    if (matrix.shape(1) != cols)
      throw std::invalid_argument("matrices packed together must have equal columns: " +
                                  std::to_string(cols) + " and " + std::to_string(matrix.shape(1)));
    parts.push_back({matrix.data(), matrix.shape(0), source_of(matrix)});
  }
  const size_t size = packed_bytes(format, parts.data(), parts.size(), interleave, cols);
  const auto [data, owner] = allocate<uint8_t>(size);
  {
    nb::gil_scoped_release release;
    pack_matrix(format, parts.data(), parts.size(), interleave, cols, data, threads);
  }
  return {data, {size}, owner};
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> unpack(const Bytes& packed, const std::string& format_name,
                                                  size_t rows, size_t cols) {
  const Format format = format_of(format_name);
  // Each row needs at least 4 bits a column, so the sizes are checked before they can overflow.
  const size_t limit = packed.size() * 2;
  if ((cols && rows > limit / cols) || matrix_bytes(format, rows, cols) > packed.size())
    throw std::invalid_argument(std::to_string(packed.size()) + " bytes do not hold " + std::to_string(rows) +
                                " x " + std::to_string(cols) + " " + format_name + " weights");
  const auto [data, owner] = allocate<float>(rows * cols);
  {
    nb::gil_scoped_release release;
    unpack_rows(format, packed.data(), rows, cols, data);
  }
  return {data, {rows, cols}, owner};
}

}  // namespace

void bind_pack(nb::module_& m) {
  m.def("pack_matrix", &pack, nb::arg("parts"), nb::arg("format"), nb::arg("interleave") = false,
        nb::arg("threads") = 1,
        "Packs matrices [rows, cols] (float32, float16, or uint16 bits of bfloat16), stacked along rows or "
        "interleaved\n"
        "in blocks of 16 rows, into a uint8 array. ValueError names how many weights are NaN or infinite.");
  m.def("unpack_rows", &unpack, nb::arg("packed"), nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
        "The first `rows` rows of a packed matrix, dequantised: float32 [rows, cols].");
  m.def(
      "packed_bytes",
      [](const std::string& format, size_t rows, size_t cols) {
        return matrix_bytes(format_of(format), rows, cols);
      },
      nb::arg("format"), nb::arg("rows"), nb::arg("cols"), "Bytes of a packed matrix.");
}

}  // namespace llmb
