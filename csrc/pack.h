// Packs weight matrices into the layout of layout.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace llmb {

enum class Source { kF32, kF16, kBF16 };

struct MatrixPart {
  const void* data;  // row-major [rows][cols]
  size_t rows;
  Source type;
};

// Bytes of the packed parts. Interleaved parts must have equal rows; each is padded to whole blocks.
size_t packed_bytes(Format format, const MatrixPart* parts, size_t num_parts, bool interleave, size_t cols);

// Packs `parts` stacked along rows (q over k over v), or, if `interleave`, blocks of 16 rows from the parts
// in turn (gate, up, gate, up, ...), into packed_bytes() bytes at `out`. The bytes do not depend on
// `num_threads`. Throws std::invalid_argument if a weight is NaN or infinite (in `format`), or interleaved
// parts differ in rows.
void pack_matrix(Format format, const MatrixPart* parts, size_t num_parts, bool interleave, size_t cols,
                 uint8_t* out, int num_threads);

// The first `rows` rows as float32 [rows][cols], rotated back.
void unpack_rows(Format format, const uint8_t* packed, size_t rows, size_t cols, float* out);

}  // namespace llmb
