// Rounds the columns of a weight matrix one after the other, each column making up for those before it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace llmb {

// A few columns of a matrix, all sizes and arrays row-major; `rows` is a multiple of kBlockRows, `cols` of
// kGroup.
struct Columns {
  Format format;
  size_t rows, cols;
  const float* weights;    // [rows][cols]
  const float* carried;    // [rows][cols]: errors of all columns before these, times their rows of the factor
  const float* factor;     // [cols][cols], upper triangular: the Hessian of the inputs is factor * factor^T
  const float* row_scale;  // [rows]
};

// With e the errors of a row, what they do to the outputs is |e factor|^2 over the inputs that the Hessian
// was taken from. Each column k takes the level that makes entry k of `e factor` smallest, and each group of
// columns the scale whose levels, chosen so, leave least of its entries (GPTQ, Frantar et al. 2023, in the
// form of LDLQ, Chee et al. 2023; the choice of scales is ours). Writes the stored values (indices of the
// codebook, or q + 128, q + 32) to values [rows][cols], scale codes to codes [rows][cols / group_cols], and
// the errors of the weights to error [rows][cols].
void round_columns(const Columns& columns, uint8_t* values, int8_t* codes, float* error, int num_threads);

}  // namespace llmb
