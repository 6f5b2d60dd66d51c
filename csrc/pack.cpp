#include "pack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "levels.h"

namespace llmb {
namespace {

// Every loop below runs over the 16 rows of a block at once, one row a vector lane: a tile is [columns][16
// rows].
constexpr int R = kBlockRows;

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
  if (rest >= 0x7c00u << 13) return from_bits(sign | rest | 0x7f800000u);
  return from_bits(std::bit_cast<uint32_t>(from_bits(rest) * 0x1p112f) |
                   sign);  // 2^112: exponent bias 15 to 127
}

uint16_t to_bf16(float x) {  // nearest, ties to even; finite x
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

bool is_finite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// One row of a part.
struct Row {
  const void* data = nullptr;  // nullptr: a row of padding
  Source type = Source::kF32;

  float operator[](size_t k) const {
    switch (type) {
      case Source::kF32:
        return static_cast<const float*>(data)[k];
      case Source::kF16:
        return half_to_float(static_cast<const uint16_t*>(data)[k]);
      default:
        return from_bits(uint32_t{static_cast<const uint16_t*>(data)[k]} << 16);
    }
  }
};

size_t source_bytes(Source type) { return type == Source::kF32 ? 4 : 2; }

// The rows of the packed matrix, block by block.
class Rows {
 public:
  Rows(const MatrixPart* parts, size_t num_parts, bool interleave, size_t cols)
      : parts_(parts, parts + num_parts), interleave_(interleave), cols_(cols) {
    size_t total = 0;
    for (const MatrixPart& part : parts_) {
      if (interleave && part.rows != parts_[0].rows)
        throw std::invalid_argument("interleaved matrices must have equal rows: " +
                                    std::to_string(parts_[0].rows) + " and " + std::to_string(part.rows));
      total += part.rows;
    }
    blocks_ =
        interleave && num_parts ? num_parts * (round_up(parts_[0].rows, R) / R) : round_up(total, R) / R;
  }

  size_t blocks() const { return blocks_; }

  std::array<Row, R> block(size_t b) const {
    std::array<Row, R> rows;
    for (int r = 0; r < R; r++) {
      rows[r] = interleave_ ? row(b % parts_.size(), b / parts_.size() * R + r) : stacked(b * R + r);
    }
    return rows;
  }

 private:
  Row row(size_t part, size_t r) const {
    const MatrixPart& p = parts_[part];
    if (r >= p.rows) return {};
    return {static_cast<const uint8_t*>(p.data) + r * cols_ * source_bytes(p.type), p.type};
  }

  Row stacked(size_t r) const {
    for (size_t part = 0; part < parts_.size(); r -= parts_[part++].rows)
      if (r < parts_[part].rows) return row(part, r);
    return {};
  }

  std::vector<MatrixPart> parts_;
  bool interleave_;
  size_t cols_, blocks_;
};

// tile[k][r] = rows[r][k]; returns how many are NaN or infinite. Padding stays as it is (zero).
size_t load(const std::array<Row, R>& rows, size_t cols, float* tile) {
  size_t bad = 0;
  for (size_t start = 0; start < cols; start += kGroup) {
    const size_t end = std::min(start + kGroup, cols);
    for (int r = 0; r < R; r++) {
      if (!rows[r].data) continue;
      for (size_t k = start; k < end; k++) {
        const float x = rows[r][k];
        bad += !is_finite(x);
        tile[k * R + r] = x;
      }
    }
  }
  return bad;
}

// tile[k][.] of each 64 columns becomes the fast Walsh-Hadamard transform of it, times `factor`.
LLMB_EVERY_WIDTH void rotate(float* tile, size_t cols, float factor) {
  for (float* t = tile; t < tile + cols * R; t += kGroup * R) {
    for (int i = 0; i < kGroup * R; i++) t[i] *= factor;
    for (int half = 1; half < kGroup; half *= 2)
      for (int k = 0; k < kGroup; k++) {
        if (k & half) continue;
        float* a = t + k * R;
        float* b = a + half * R;
        for (int r = 0; r < R; r++) {
          const float x = a[r], y = b[r];
          a[r] = x + y;
          b[r] = x - y;
        }
      }
  }
}

void store_f32(const float* tile, size_t cols, uint8_t* out) {
  std::memcpy(out, tile, cols * R * sizeof(float));
}

size_t store_bf16(const float* tile, size_t cols, uint8_t* out) {
  size_t bad = 0;
  for (size_t k = 0; k < cols; k++)
    for (int r = 0; r < R; r++) {
      const uint16_t x = to_bf16(tile[k * R + r]);
      bad += (x & 0x7f80) == 0x7f80;  // a float beyond bfloat16's largest
      std::memcpy(out + (k / 2 * R + r) * 4 + k % 2 * 2, &x, 2);
    }
  return bad;
}

// The largest magnitude in each row of a group.
void largest(const float* group, int cols, float* out) {
  for (int r = 0; r < R; r++) out[r] = 0;
  for (int k = 0; k < cols; k++)
    for (int r = 0; r < R; r++) out[r] = std::max(out[r], std::fabs(group[k * R + r]));
}

void int8_scales(const float* group, float* scale) {
  largest(group, group_cols(Format::kInt8), scale);
  for (int r = 0; r < R; r++) scale[r] = scale[r] < kTiny ? 0 : scale[r] * (1 / 127.0f);
}

// For fixed levels c of the weights w the best scale is <w, c> / <c, c>, and what it explains of |w|^2 is
// <w, c>^2 / <c, c>. Rounds each weight of a group to its nearest level under `guess`; where that explains
// more of a row than `best` does, takes the scale that is best for these levels. Weights and scales are in
// units of 1 / `unit`.
template <typename Levels>
inline void improve(const float* group, const float* unit, const float* guess, float* best, float* scale) {
  float stretch[R], wc[R] = {}, cc[R] = {};
  for (int r = 0; r < R; r++) stretch[r] = 1 / guess[r];
  for (int k = 0; k < group_cols(Levels::kFormat); k++)
    for (int r = 0; r < R; r++) {
      const float w = group[k * R + r] * unit[r], value = Levels::nearest(w * stretch[r]);
      wc[r] += w * value;
      cc[r] += value * value;
    }
  for (int r = 0; r < R; r++) {
    const float candidate = wc[r] / cc[r], explained = wc[r] * candidate;
    scale[r] = explained > best[r] ? candidate : scale[r];
    best[r] = std::max(best[r], explained);
  }
}

// The scale of either sign that gives each row of a group the least squared error: the best of some guesses a
// sign, and then twice rounded again and refitted.
template <typename Levels>
inline void searched_scales(const float* group, float* scale) {
  float top[R], unit[R], guess[R], best[R] = {};
  largest(group, group_cols(Levels::kFormat), top);
  for (int r = 0; r < R; r++) unit[r] = top[r] < kTiny ? 0 : 1 / top[r];
  for (int r = 0; r < R; r++) scale[r] = 1;
  for (const float share : Levels::kGuesses)
    for (const float end : {Levels::kEnd, -Levels::kEnd}) {
      for (int r = 0; r < R; r++) guess[r] = share / end;
      improve<Levels>(group, unit, guess, best, scale);
    }
  for (int i = 0; i < 2; i++) {
    for (int r = 0; r < R; r++) guess[r] = scale[r];
    improve<Levels>(group, unit, guess, best, scale);
  }
  for (int r = 0; r < R; r++) scale[r] = top[r] < kTiny ? 0 : scale[r] * top[r];
}

LLMB_EVERY_WIDTH void int4_scales(const float* group, float* scale) {
  searched_scales<Int4Levels>(group, scale);
}

LLMB_EVERY_WIDTH void int6_scales(const float* group, float* scale) {
  searched_scales<Int6Levels>(group, scale);
}

// Writes row scales and scale codes; scales [groups][16] become the inverses of the scales that these stand
// for.
void store_header(float* scales, size_t groups, uint8_t* out) {
  float row_scale[R] = {};
  for (size_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) row_scale[r] = std::max(row_scale[r], std::fabs(scales[g * R + r]));
  for (int r = 0; r < R; r++) row_scale[r] /= kMaxCode;
  std::memcpy(out, row_scale, sizeof row_scale);
  auto* codes = reinterpret_cast<int8_t*>(out + sizeof row_scale);
  for (size_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) {
      float& scale = scales[g * R + r];
      if (scale == 0) {
        codes[g * R + r] = 0;
        continue;
      }
      const float code = std::clamp(round_even(std::fabs(scale) / row_scale[r]), 1.0f, float{kMaxCode});
      const float signed_code = std::copysign(code, scale);
      codes[g * R + r] = static_cast<int8_t>(signed_code);
      scale = 1 / (row_scale[r] * signed_code);
    }
}

LLMB_EVERY_WIDTH void store_int8(const float* tile, const float* inverse, size_t cols, uint8_t* out) {
  for (size_t k = 0; k < cols; k++)
    for (int r = 0; r < R; r++) {
      const float q = round_even(tile[k * R + r] * inverse[k / group_cols(Format::kInt8) * R + r]);
      out[(k / 4 * R + r) * 4 + k % 4] =
          static_cast<uint8_t>(static_cast<int>(std::clamp(q, -127.0f, 127.0f)) + 128);
    }
}

LLMB_EVERY_WIDTH void store_int4(const float* tile, const float* inverse, size_t cols, uint8_t* out) {
  for (size_t k = 0; k < cols; k++) {
    int index[R];
    for (int r = 0; r < R; r++) {
      const float t = tile[k * R + r] * inverse[k / group_cols(Format::kInt4) * R + r];
      int above = 0;
      for (int i = 0; i < 15; i++) above += t > kCodebook.midpoint[i];
      index[r] = above;
    }
    uint8_t* step = out + k / 8 * R * 4 + k % 4;
    for (int r = 0; r < R; r++) {
      if (k & 4)
        step[r * 4] |= static_cast<uint8_t>(index[r] << 4);
      else
        step[r * 4] = static_cast<uint8_t>(index[r]);
    }
  }
}

LLMB_EVERY_WIDTH void store_int6(const float* tile, const float* inverse, size_t cols, uint8_t* out) {
  std::memset(out, 0, step_bytes(Format::kInt6, cols / 4));
  for (size_t k = 0; k < cols; k++) {
    const size_t step = k / 4 % kGroupSteps;
    uint8_t* group = out + step_bytes(Format::kInt6, k / kGroup * kGroupSteps) + k % 4;
    uint8_t* low = group + step / 2 * kStepBytes;
    uint8_t* high = group + (kGroupSteps / 2 + step / 4) * kStepBytes;
    for (int r = 0; r < R; r++) {
      const float t = tile[k * R + r] * inverse[k / group_cols(Format::kInt6) * R + r];
      const int q = static_cast<int>(Int6Levels::nearest(t)) / 4 + 32;
      low[r * 4] |= static_cast<uint8_t>((q & 15) << (step % 2 * 4));
      high[r * 4] |= static_cast<uint8_t>((q >> 4) << (step % 4 * 2));
    }
  }
}

// What differs from one quantised format to another.
struct Quantizer {
  void (*scales)(const float* group, float* scale);
  void (*store)(const float* tile, const float* inverse, size_t cols, uint8_t* out);
};

Quantizer quantizer(Format format) {
  switch (format) {
    case Format::kInt4:
      return {int4_scales, store_int4};
    case Format::kInt6:
      return {int6_scales, store_int6};
    default:
      return {int8_scales, store_int8};
  }
}

void store_quantized(Format format, float* tile, size_t cols, std::vector<float>& scales, uint8_t* out) {
  const size_t padded = padded_cols(format, cols), num_groups = groups(format, cols);
  const Quantizer q = quantizer(format);
  if (is_quantized(format)) rotate(tile, padded, 1.0f / kGroup);
  for (size_t g = 0; g < num_groups; g++) q.scales(tile + g * group_cols(format) * R, &scales[g * R]);
  std::memset(out, 0, header_bytes(format, cols));
  store_header(scales.data(), num_groups, out);
  q.store(tile, scales.data(), padded, out + header_bytes(format, cols));
}

// Packs one block; returns how many weights are NaN or infinite.
size_t pack_block(Format format, const std::array<Row, R>& rows, size_t cols, std::vector<float>& tile,
                  std::vector<float>& scales, uint8_t* out) {
  std::fill(tile.begin(), tile.end(), 0.0f);
  if (const size_t bad = load(rows, cols, tile.data())) return bad;
  switch (format) {
    case Format::kF32:
      store_f32(tile.data(), cols, out);
      return 0;
    case Format::kBF16:
      return store_bf16(tile.data(), padded_cols(format, cols), out);
    default:
      store_quantized(format, tile.data(), cols, scales, out);
      return 0;
  }
}

// The u8 value of column k in row r of a block of quantised values.
int value_at(Format format, const uint8_t* values, size_t k, int r) {
  const size_t step = k / 4, byte = r * 4 + k % 4;
  if (format == Format::kInt8) return values[step * kStepBytes + byte];
  if (format == Format::kInt4)
    return kInt4Codebook[values[step / 2 * kStepBytes + byte] >> (step % 2 * 4) & 15];
  const uint8_t* group = values + step_bytes(format, step / kGroupSteps * kGroupSteps);
  const size_t s = step % kGroupSteps;
  const int low = group[s / 2 * kStepBytes + byte] >> (s % 2 * 4) & 15;
  const int high = group[(kGroupSteps / 2 + s / 4) * kStepBytes + byte] >> (s % 4 * 2) & 3;
  return 4 * (low | high << 4);
}

}  // namespace

size_t packed_bytes(Format format, const MatrixPart* parts, size_t num_parts, bool interleave, size_t cols) {
  return Rows(parts, num_parts, interleave, cols).blocks() * block_bytes(format, cols);
}

void pack_matrix(Format format, const MatrixPart* parts, size_t num_parts, bool interleave, size_t cols,
                 uint8_t* out, int num_threads) {
  const Rows rows(parts, num_parts, interleave, cols);
  std::atomic<size_t> next{0}, bad{0};
  const auto work = [&] {
    std::vector<float> tile(padded_cols(format, cols) * R), scales(groups(format, cols) * R);
    for (size_t b; (b = next++) < rows.blocks();)
      bad += pack_block(format, rows.block(b), cols, tile, scales, out + b * block_bytes(format, cols));
  };
  std::vector<std::jthread> others;  // join themselves, also when one more cannot start
  for (int i = 1; i < num_threads; i++) others.emplace_back(work);
  work();
  others.clear();
  if (bad) throw std::invalid_argument(std::to_string(bad) + " weights are NaN or infinite");
}

void unpack_rows(Format format, const uint8_t* packed, size_t rows, size_t cols, float* out) {
  const size_t padded = padded_cols(format, cols);
  std::vector<float> tile(padded * R);
  for (size_t first = 0; first < rows; first += R, packed += block_bytes(format, cols)) {
    const uint8_t* quants = packed + header_bytes(format, cols);
    float row_scale[R];
    if (is_quantized(format)) std::memcpy(row_scale, packed, sizeof row_scale);
    const auto* codes = reinterpret_cast<const int8_t*>(packed + sizeof row_scale);
    for (size_t k = 0; k < padded; k++)
      for (int r = 0; r < R; r++) {
        float& x = tile[k * R + r];
        if (format == Format::kF32) {
          std::memcpy(&x, quants + (k * R + r) * 4, 4);
        } else if (format == Format::kBF16) {
          uint16_t bits;
          std::memcpy(&bits, quants + (k / 2 * R + r) * 4 + k % 2 * 2, 2);
          x = from_bits(uint32_t{bits} << 16);
        } else {
          const float scale = row_scale[r] * codes[k / group_cols(format) * R + r];
          x = scale * static_cast<float>(value_at(format, quants, k, r) - 128);
        }
      }
    if (is_quantized(format)) rotate(tile.data(), padded, 1.0f);
    for (size_t r = 0; r < std::min<size_t>(R, rows - first); r++)
      for (size_t k = 0; k < cols; k++) out[(first + r) * cols + k] = tile[k * R + r];
  }
}

}  // namespace llmb
