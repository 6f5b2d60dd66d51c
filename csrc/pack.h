// From row-major weights to the packed layout (layout.h).
#pragma once

#include <vector>

#include "layout.h"

namespace llmb {

enum class Source { kF32, kF16, kBF16 };

struct MatrixPart {
  const void* data;  // [rows][cols]
  size_t rows;
  Source type;
};

// Packs `parts` stacked along rows; with `interleave`, blocks of kBlockRows rows are taken from the parts in turn, each
// part padded to whole blocks. The bytes do not depend on the number of threads.
// Throws std::invalid_argument when a weight is not a finite number.
void pack_matrix(Format format, const std::vector<MatrixPart>& parts, bool interleave, size_t cols, uint8_t* out,
                 int num_threads);

// The weights that packed bytes stand for, [rows][cols].
void unpack_matrix(Format format, const uint8_t* packed, size_t rows, size_t cols, float* out);

}  // namespace llmb
