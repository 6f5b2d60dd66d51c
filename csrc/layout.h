// The packed weight layout: the same bytes for every instruction set.
//
// A matrix of [rows][cols] is cut into blocks of kBlockRows rows. Inside a block, a step holds 4 bytes of every
// row (1 float, 2 bfloat16 or 4 int8 along k), that is one 64-byte vector:
//
//   f32, bf16:  block = [steps][16 rows][4 bytes]
//   int8:       block = [16 f32 row scales][groups][16] i8 scale codes (padded to 64 B)[steps][16][4] u8 (value + 128)
//   int4:       the same header, then [steps/2][16][4] bytes: the low nibble belongs to step 2i, the high one to
//               step 2i+1; a nibble is an index into kInt4Codebook
//
//   weight = row_scale * code[group] * (u8 - 128)      int4: * (kInt4Codebook[nibble] - 128)
//
// Columns are padded with zeros to a whole step (f32, bf16) or group (int8, int4), rows to a whole block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmb {

enum class Format : int { kF32 = 0, kBF16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int kBlockRows = 16;
constexpr int kStepBytes = 64;  // kBlockRows rows of 4 bytes
constexpr int kGroup = 64;      // columns that share a scale, in weights and in activations
constexpr int kGroupSteps = kGroup / 4;

static constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static constexpr size_t padded_cols(Format f, size_t cols) {
  switch (f) {
    case Format::kF32: return cols;
    case Format::kBF16: return round_up(cols, 2);
    default: return round_up(cols, kGroup);
  }
}

// Steps of 4 activation bytes along k.
static constexpr size_t steps(Format f, size_t cols) {
  const size_t k = padded_cols(f, cols);
  return f == Format::kF32 ? k : f == Format::kBF16 ? k / 2 : k / 4;
}

static constexpr bool is_quantized(Format f) { return f == Format::kInt8 || f == Format::kInt4; }

// Bytes before the quants of a block: row scales and scale codes.
static constexpr size_t header_bytes(Format f, size_t cols) {
  return is_quantized(f) ? 64 + round_up(padded_cols(f, cols) / kGroup * kBlockRows, 64) : 0;
}

static constexpr size_t block_bytes(Format f, size_t cols) {
  const size_t quants = steps(f, cols) * kStepBytes;
  return header_bytes(f, cols) + (f == Format::kInt4 ? quants / 2 : quants);
}

static constexpr size_t matrix_bytes(Format f, size_t rows, size_t cols) {
  return round_up(rows, kBlockRows) / kBlockRows * block_bytes(f, cols);
}

// Values of a 4-bit weight in units of its scale, plus 128: denser near zero, where most weights of a group lie.
constexpr uint8_t kInt4Codebook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace llmb
