#include "calibrate.h"

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <thread>
#include <vector>

#include "levels.h"

namespace llmb {
namespace {

// Every loop below runs over 16 rows at once, one row a vector lane: a tile is [columns][16 rows].
constexpr int R = kBlockRows;

// One group of columns of 16 rows. `wanted` is (weights factor + carried): what the entries of `e factor`
// would be if every level were zero.
struct Group {
  const float* factor;  // [n][stride]
  size_t stride;
  float inverse[kGroup];  // of the factor's diagonal
  float wanted[kGroup * R];
};

// Rounds the columns in order under `scale`; level[k][r] in units of it, and reached[k][r] is entry k of
// `level factor`, so that wanted - scale * reached is what remains.
template <typename Levels>
inline void round_group(const Group& group, const float* scale, float* level, float* reached) {
  constexpr int n = group_cols(Levels::kFormat);
  float stretch[R];
  for (int r = 0; r < R; r++) stretch[r] = 1 / scale[r];
  for (int i = 0; i < n * R; i++) reached[i] = 0;
  for (int k = 0; k < n; k++) {
    const float* row = group.factor + k * group.stride;
    for (int r = 0; r < R; r++) {
      const float target = group.wanted[k * R + r] * stretch[r] - reached[k * R + r];
      level[k * R + r] = Levels::nearest(target * group.inverse[k]);
    }
    for (int later = k; later < n; later++)
      for (int r = 0; r < R; r++) reached[later * R + r] += level[k * R + r] * row[later];
  }
}

// For fixed levels the best scale is <wanted, reached> / <reached, reached>, and it explains <wanted,
// reached>^2 / <reached, reached> of |wanted|^2. Where `guess` leads to more than `best`, takes that scale.
template <typename Levels>
inline void improve(const Group& group, const float* guess, float* best, float* scale) {
  constexpr int n = group_cols(Levels::kFormat);
  float level[n * R], reached[n * R], wr[R] = {}, rr[R] = {};
  round_group<Levels>(group, guess, level, reached);
  for (int k = 0; k < n; k++)
    for (int r = 0; r < R; r++) {
      wr[r] += group.wanted[k * R + r] * reached[k * R + r];
      rr[r] += reached[k * R + r] * reached[k * R + r];
    }
  for (int r = 0; r < R; r++) {
    const float candidate = wr[r] / rr[r], explained = wr[r] * candidate;
    const bool better = explained > best[r];
    scale[r] = better ? candidate : scale[r];
    best[r] = better ? explained : best[r];
  }
}

// As the packer's search (pack.cpp): guesses of either sign from `top`, the largest weight, then refitted
// twice.
template <typename Levels>
inline void search_scale(const Group& group, const float* top, float* scale) {
  float guess[R], best[R] = {};
  for (int r = 0; r < R; r++) scale[r] = std::max(top[r], kTiny) / Levels::kEnd;
  for (const float share : Levels::kGuesses)
    for (const float end : {Levels::kEnd, -Levels::kEnd}) {
      for (int r = 0; r < R; r++) guess[r] = std::max(top[r], kTiny) * share / end;
      improve<Levels>(group, guess, best, scale);
    }
  for (int i = 0; i < 2; i++) {
    for (int r = 0; r < R; r++) guess[r] = scale[r];
    improve<Levels>(group, guess, best, scale);
  }
}

uint8_t stored(Format format, float level) {
  if (format == Format::kInt8) return static_cast<uint8_t>(static_cast<int>(level) + 128);
  if (format == Format::kInt6) return static_cast<uint8_t>(static_cast<int>(level) / 4 + 32);
  uint8_t index = 0;
  while (index < 15 && kCodebook.value[index] < level) index++;
  return index;
}

// A tile of 16 rows: weights and carried are [cols][16], and become errors and what is carried on.
template <typename Levels>
inline void round_tile(const Columns& c, size_t first_row, float* weights, float* carried, uint8_t* values,
                       int8_t* codes) {
  constexpr int n = group_cols(Levels::kFormat);
  const float* row_scale = c.row_scale + first_row;
  Group group;
  group.stride = c.cols;
  for (size_t start = 0; start < c.cols; start += n) {
    float *w = weights + start * R, *carry = carried + start * R;
    float top[R] = {}, scale[R], level[n * R], reached[n * R];
    group.factor = c.factor + start * c.cols + start;
    for (int k = 0; k < n; k++) group.inverse[k] = 1 / group.factor[k * c.cols + k];
    for (int i = 0; i < n * R; i++) group.wanted[i] = carry[i];
    for (int k = 0; k < n; k++) {
      for (int r = 0; r < R; r++)
        top[r] = std::max(top[r], std::fabs(w[k * R + r] + carry[k * R + r] * group.inverse[k]));
      for (int later = k; later < n; later++)
        for (int r = 0; r < R; r++)
          group.wanted[later * R + r] += w[k * R + r] * group.factor[k * c.cols + later];
    }
    search_scale<Levels>(group, top, scale);
    int8_t code[R];
    for (int r = 0; r < R; r++) {
      const bool zero = top[r] < kTiny || row_scale[r] < kTiny;
      const float size = zero ? 0.0f : round_even(std::fabs(scale[r]) / row_scale[r]);
      const float signed_code = std::copysign(std::clamp(size, 1.0f, float{kMaxCode}), scale[r]);
      code[r] = zero ? 0 : static_cast<int8_t>(signed_code);
      scale[r] = zero ? kTiny : row_scale[r] * signed_code;
    }
    round_group<Levels>(group, scale, level, reached);
    for (int r = 0; r < R; r++) {
      codes[(first_row + r) * (c.cols / n) + start / n] = code[r];
      if (!code[r]) scale[r] = 0;
      for (int k = 0; k < n; k++) {
        values[(first_row + r) * c.cols + start + k] =
            stored(Levels::kFormat, code[r] ? level[k * R + r] : 0.0f);
        w[k * R + r] -= scale[r] * level[k * R + r];
      }
    }
    for (int k = 0; k < n; k++)
      for (size_t later = start + n; later < c.cols; later++)
        for (int r = 0; r < R; r++)
          carried[later * R + r] += w[k * R + r] * c.factor[(start + k) * c.cols + later];
  }
}

LLMB_EVERY_WIDTH void round_int4(const Columns& c, size_t row, float* w, float* carried, uint8_t* v,
                                 int8_t* s) {
  round_tile<Int4Levels>(c, row, w, carried, v, s);
}

LLMB_EVERY_WIDTH void round_int6(const Columns& c, size_t row, float* w, float* carried, uint8_t* v,
                                 int8_t* s) {
  round_tile<Int6Levels>(c, row, w, carried, v, s);
}

LLMB_EVERY_WIDTH void round_int8(const Columns& c, size_t row, float* w, float* carried, uint8_t* v,
                                 int8_t* s) {
  round_tile<Int8Levels>(c, row, w, carried, v, s);
}

// [16][cols] of a row-major matrix to [cols][16], and back.
void to_tile(const float* rows, size_t cols, float* tile) {
  for (int r = 0; r < R; r++)
    for (size_t k = 0; k < cols; k++) tile[k * R + r] = rows[r * cols + k];
}

void from_tile(const float* tile, size_t cols, float* rows) {
  for (int r = 0; r < R; r++)
    for (size_t k = 0; k < cols; k++) rows[r * cols + k] = tile[k * R + r];
}

}  // namespace

void round_columns(const Columns& c, uint8_t* values, int8_t* codes, float* error, int num_threads) {
  if (!is_quantized(c.format))
    throw std::invalid_argument("only int8, int6 and int4 are rounded column by column");
  if (c.rows % R || c.cols % kGroup)
    throw std::invalid_argument("rows must be a multiple of 16, columns of 64");
  const auto round = c.format == Format::kInt4   ? round_int4
                     : c.format == Format::kInt6 ? round_int6
                                                 : round_int8;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    std::vector<float> weights(c.cols * R), carried(c.cols * R);
    for (size_t b; (b = next++) < c.rows / R;) {
      to_tile(c.weights + b * R * c.cols, c.cols, weights.data());
      to_tile(c.carried + b * R * c.cols, c.cols, carried.data());
      round(c, b * R, weights.data(), carried.data(), values, codes);
      from_tile(weights.data(), c.cols, error + b * R * c.cols);
    }
  };
  std::vector<std::jthread> others;  // join themselves, also when one more cannot start
  for (int i = 1; i < num_threads; i++) others.emplace_back(work);
  work();
}

}  // namespace llmb
