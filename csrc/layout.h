// The packed weight layout: the same bytes for every instruction set.
//
// A matrix of [rows][cols] is cut into blocks of kBlockRows rows. Inside a block, a step holds 4 bytes of
// every row (1 float, 2 bfloat16 or 4 int8 along k), that is one 64-byte vector:
//
//   f32, bf16:  block = [steps][16 rows][4 bytes]
//   quantised:  block = [16 f32 row scales][weight groups][16] i8 scale codes (padded to 64 B), then the
//   values:
//     int8:     [steps][16][4] u8
//     int6:     a group of 16 steps is [8][16][4] nibbles, [4][16][4] pairs of bits. Nibble vector i holds
//     the low four
//               bits of step 2i in its low half and of step 2i + 1 in its high half; bits 2j and 2j + 1 of
//               pair vector i are the high bits of step 4i + j
//     int4:     [steps/2][16][4] nibbles, as above: indices into kInt4Codebook
//
//   weight = row_scale * code[group] * (u8 - 128)    where u8 is the value, 4 * the six bits, or the
//   codebook's entry
//
// Activations are int8 with one scale for kGroup columns. Beside quantised weights both sides are rotated:
// with H the 64-point Walsh-Hadamard matrix (entries +1 and -1, Sylvester's order) applied to each kGroup
// columns, W x = (W H / 64)(H x); the packer stores W H / 64, and H x is what is quantised. The rotation
// spreads an outlier over its neighbours, which halves the error of the activations (benchmarks/DIARY.md,
// 2026-11-22).
//
// A scale code is signed: the int4 codebook is not symmetric, and a group may use it mirrored.
//
// Columns are padded with zeros to a whole step (f32, bf16) or group of kGroup (the others, before the
// transform), rows to a whole block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmb {

enum class Format : int { kF32 = 0, kBF16 = 1, kInt8 = 2, kInt4 = 3, kInt6 = 4 };

constexpr int kBlockRows = 16;
constexpr int kStepBytes = 64;  // kBlockRows rows of 4 bytes
constexpr int kGroup = 64;      // columns that are rotated together, and activations that share a scale
constexpr int kGroupSteps = kGroup / 4;

static constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static constexpr size_t padded_cols(Format f, size_t cols) {
  switch (f) {
    case Format::kF32:
      return cols;
    case Format::kBF16:
      return round_up(cols, 2);
    default:
      return round_up(cols, kGroup);
  }
}

// Steps of 4 activation bytes along k.
static constexpr size_t steps(Format f, size_t cols) {
  const size_t k = padded_cols(f, cols);
  return f == Format::kF32 ? k : f == Format::kBF16 ? k / 2 : k / 4;
}

static constexpr bool is_quantized(Format f) { return f != Format::kF32 && f != Format::kBF16; }

constexpr int kMaxCode = 127;  // scale codes are within [-kMaxCode, kMaxCode]

// Columns of weights that share a scale code.
static constexpr int group_cols(Format f) { return f == Format::kInt4 ? 32 : 64; }

static constexpr size_t groups(Format f, size_t cols) {
  return is_quantized(f) ? padded_cols(f, cols) / group_cols(f) : 0;
}

// Bytes before the values of a block: row scales and scale codes.
static constexpr size_t header_bytes(Format f, size_t cols) {
  return is_quantized(f) ? 64 + round_up(groups(f, cols) * kBlockRows, 64) : 0;
}

// Bytes of the first n steps of a block's values; n is even for int4, a multiple of kGroupSteps for int6.
static constexpr size_t step_bytes(Format f, size_t n) {
  return f == Format::kInt4   ? n * kStepBytes / 2
         : f == Format::kInt6 ? n * kStepBytes * 3 / 4
                              : n * kStepBytes;
}

static constexpr size_t block_bytes(Format f, size_t cols) {
  return header_bytes(f, cols) + step_bytes(f, steps(f, cols));
}

static constexpr size_t matrix_bytes(Format f, size_t rows, size_t cols) {
  return round_up(rows, kBlockRows) / kBlockRows * block_bytes(f, cols);
}

// Values of a 4-bit weight in units of its scale, plus 128: the levels of least squared error for groups of
// 32 Gaussian values, each group with the scale and sign that suit it best. Ascending.
constexpr uint8_t kInt4Codebook[16] = {1,   27,  49,  66,  81,  95,  107, 119,
                                       130, 141, 153, 165, 178, 193, 211, 235};

}  // namespace llmb
