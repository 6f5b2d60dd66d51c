// Python's view of the calibrated method's inner loop: round_columns.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "calibrate.h"

namespace nb = nanobind;

namespace llmb {
namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Out = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Array>
void require_shape(const char* name, const Array& array, size_t rows, size_t cols) {
  if (array.shape(0) != rows || array.shape(1) != cols)
    throw std::invalid_argument(std::string(name) + " is [" + std::to_string(array.shape(0)) + ", " +
                                std::to_string(array.shape(1)) + "], not [" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "]");
}

void round(const std::string& format_name, const Matrix& weights, const Matrix& carried, const Matrix& factor,
           const Floats& row_scale, const Out<uint8_t>& values, const Out<int8_t>& codes,
           const Out<float>& error, int threads) {
  const Format format = format_of(format_name);
  const size_t rows = weights.shape(0), cols = weights.shape(1);
  require_shape("carried", carried, rows, cols);
  require_shape("factor", factor, cols, cols);
  require_shape("values", values, rows, cols);
  require_shape("codes", codes, rows, cols / group_cols(format));
  require_shape("error", error, rows, cols);
  if (row_scale.size() != rows) throw std::invalid_argument("row_scale must have a number a row");
  const Columns columns{format, rows, cols, weights.data(), carried.data(), factor.data(), row_scale.data()};
  nb::gil_scoped_release release;
  round_columns(columns, values.data(), codes.data(), error.data(), threads);
}

}  // namespace

void bind_calibrate(nb::module_& m) {
  m.def("round_columns", &round, nb::arg("format"), nb::arg("weights"), nb::arg("carried"), nb::arg("factor"),
        nb::arg("row_scale"), nb::arg("values"), nb::arg("codes"), nb::arg("error"), nb::arg("threads") = 1,
        "Rounds a few columns of a matrix [rows, cols] in order, each making up for those before it "
        "(csrc/calibrate.h);\n"
        "fills values (uint8), codes (int8, [rows, groups]) and error (float32).");
}

}  // namespace llmb
