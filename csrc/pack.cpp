#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

// Plain loops that the compiler vectorises for the processor at hand; without contraction all clones agree to the bit.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define LLMB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LLMB_CLONES
#endif

namespace llmb {
namespace {

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // nearest even; x is finite
}

float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, exponent = (x >> 10) & 31u, mantissa = x & 0x3ffu;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void load_row(const MatrixPart& part, size_t row, size_t cols, float* out) {
  const size_t at = row * cols;
  switch (part.type) {
    case Source::kF32: std::memcpy(out, static_cast<const float*>(part.data) + at, cols * sizeof(float)); return;
    case Source::kF16:
      for (size_t i = 0; i < cols; ++i) out[i] = from_f16(static_cast<const uint16_t*>(part.data)[at + i]);
      return;
    case Source::kBF16:
      for (size_t i = 0; i < cols; ++i) out[i] = from_bf16(static_cast<const uint16_t*>(part.data)[at + i]);
      return;
  }
}

// ---- choosing scales and values of one group --------------------------------------------------------------------

// What a group's values are rounded to: levels in units of the scale, ascending, with the borders between them.
struct Levels {
  int count = 0;
  float level[16];
  float border[15];

  Levels() {
    count = 16;
    for (int i = 0; i < 16; ++i) level[i] = static_cast<float>(kInt4Codebook[i]) - 128.0f;
    for (int i = 0; i < 15; ++i) border[i] = (level[i] + level[i + 1]) / 2;
  }
};

const Levels& codebook() {
  static const Levels levels;
  return levels;
}

// out[i] = the nearest level of x[i] * inverse.
LLMB_CLONES void nearest_levels(const float* __restrict x, float inverse, const Levels& levels, float* __restrict out) {
  constexpr int n = weight_group(Format::kInt4);
  const Levels local = levels;
  for (int i = 0; i < n; ++i) out[i] = local.level[0];
  for (int j = 0; j < 15; ++j) {
    const float border = local.border[j], level = local.level[j + 1];
    for (int i = 0; i < n; ++i) out[i] = x[i] * inverse > border ? level : out[i];
  }
}

LLMB_CLONES void nearest_integers(const float* __restrict x, float inverse, int n, float low, float high,
                                  float* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const float y = x[i] * inverse;
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    out[i] = (std::min(std::max(y, low), high) + magic) - magic;
  }
}

struct Fit {
  float error;   // sum of (x - scale * v)^2
  float refined;  // the scale that would make it smallest with these values
};

LLMB_CLONES Fit fit(const float* __restrict x, const float* __restrict v, float scale, int n) {
  float error[16] = {}, cross[16] = {}, square[16] = {};
  for (int i = 0; i < n; i += 16)
    for (int l = 0; l < 16; ++l) {
      const float d = x[i + l] - scale * v[i + l];
      error[l] += d * d;
      cross[l] += x[i + l] * v[i + l];
      square[l] += v[i + l] * v[i + l];
    }
  float e = 0, c = 0, s = 0;
  for (int l = 0; l < 16; ++l) {
    e += error[l];
    c += cross[l];
    s += square[l];
  }
  return {e, s > 0 ? c / s : 0.0f};
}

// Rounds a group to its format's levels at a given scale; v in units of the scale.
void round_group(Format f, const float* x, float scale, int n, float* v) {
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  switch (f) {
    case Format::kInt8: return nearest_integers(x, inverse, n, -127.0f, 127.0f, v);
    case Format::kInt6:
      nearest_integers(x, inverse / 4.0f, n, -32.0f, 31.0f, v);
      for (int i = 0; i < n; ++i) v[i] *= 4.0f;
      return;
    default: return nearest_levels(x, inverse, codebook(), v);
  }
}

// The scale that loses least, of some around the one that maps the largest value to the end of the range, of either
// sign (the ranges of int6 and int4 are not symmetric); then refined by least squares.
float best_scale(Format f, const float* x, int n) {
  float peak = 0;
  for (int i = 0; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
  if (peak < 1e-30f) return 0.0f;
  if (f == Format::kInt8) return peak / 127.0f;
  const float end = f == Format::kInt6 ? 128.0f : 128.0f - static_cast<float>(kInt4Codebook[0]);
  const float first = f == Format::kInt6 ? 0.94f : 0.74f, last = f == Format::kInt6 ? 1.05f : 1.16f;
  const int candidates = f == Format::kInt6 ? 4 : 9;
  float v[kGroup], best = 0, refined = 0, error = INFINITY;
  const auto consider = [&](float scale) {
    round_group(f, x, scale, n, v);
    const Fit result = fit(x, v, scale, n);
    if (result.error < error) {
      error = result.error;
      best = scale;
      refined = result.refined;
    }
  };
  for (int sign = -1; sign <= 1; sign += 2)
    for (int i = 0; i < candidates; ++i) {
      const float factor = first + (last - first) * static_cast<float>(i) / static_cast<float>(candidates - 1);
      consider(static_cast<float>(sign) * peak * factor / end);
    }
  for (int pass = 0; pass < 2; ++pass) consider(refined);
  return best;
}

// ---- blocks --------------------------------------------------------------------------------------------------

void hadamard(float* x) {
  for (int h = 1; h < kGroup; h *= 2)
    for (int i = 0; i < kGroup; ++i)
      if (!(i & h)) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
}

// The value of `row` at column k goes to byte 4 * row + k % 4 of step k / 4.
void put_value(Format f, uint8_t* values, size_t row, size_t k, float level) {
  const size_t step = k / 4, byte = row * 4 + k % 4;
  const int u = static_cast<int>(level) + 128;
  if (f == Format::kInt8) {
    values[step * kStepBytes + byte] = static_cast<uint8_t>(u);
    return;
  }
  if (f == Format::kInt4) {
    const auto index = std::find(kInt4Codebook, kInt4Codebook + 16, u) - kInt4Codebook;
    values[step / 2 * kStepBytes + byte] |= static_cast<uint8_t>(index << (step % 2 * 4));
    return;
  }
  uint8_t* group = values + step_bytes(f, step / kGroupSteps * kGroupSteps);
  const size_t s = step % kGroupSteps, q = u / 4;
  group[s / 2 * kStepBytes + byte] |= static_cast<uint8_t>((q & 15) << (s % 2 * 4));
  group[(kGroupSteps / 2 + s / 4) * kStepBytes + byte] |= static_cast<uint8_t>((q >> 4) << (s % 4 * 2));
}

void pack_quantized_row(Format f, size_t cols, float* x, size_t row, uint8_t* block) {
  const size_t padded = padded_cols(f, cols), group = weight_group(f), groups = padded / group;
  if (is_transformed(f))
    for (size_t k = 0; k < padded; k += kGroup) {
      hadamard(x + k);
      for (int i = 0; i < kGroup; ++i) x[k + i] *= 1.0f / kGroup;
    }
  std::vector<float> scales(groups);
  float peak = 0;
  for (size_t g = 0; g < groups; ++g) {
    scales[g] = best_scale(f, x + g * group, static_cast<int>(group));
    peak = std::max(peak, std::fabs(scales[g]));
  }
  const float row_scale = peak / 127.0f;
  std::memcpy(block + row * 4, &row_scale, 4);
  uint8_t* codes = block + 64;
  uint8_t* values = block + header_bytes(f, cols);
  for (size_t g = 0; g < groups; ++g) {
    float code = row_scale > 0 ? std::nearbyint(scales[g] / row_scale) : 0.0f;
    if (code == 0.0f && scales[g] != 0.0f) code = scales[g] > 0 ? 1.0f : -1.0f;
    codes[g * kBlockRows + row] = static_cast<uint8_t>(static_cast<int8_t>(code));
    float v[kGroup];
    round_group(f, x + g * group, code * row_scale, static_cast<int>(group), v);
    for (size_t i = 0; i < group; ++i) put_value(f, values, row, g * group + i, v[i]);
  }
}

void pack_row(Format f, size_t cols, float* x, size_t row, uint8_t* block) {
  if (f == Format::kF32) {
    for (size_t k = 0; k < cols; ++k) std::memcpy(block + k * kStepBytes + row * 4, x + k, 4);
  } else if (f == Format::kBF16) {
    for (size_t k = 0; k < padded_cols(f, cols); ++k) {
      const uint16_t half = to_bf16(x[k]);
      std::memcpy(block + k / 2 * kStepBytes + row * 4 + k % 2 * 2, &half, 2);
    }
  } else {
    pack_quantized_row(f, cols, x, row, block);
  }
}

// Where the rows of a packed block come from.
struct Rows {
  const std::vector<MatrixPart>& parts;
  bool interleave;

  size_t blocks() const {
    size_t rows = 0, blocks = 0;
    for (const MatrixPart& p : parts) {
      rows += p.rows;
      blocks += (p.rows + kBlockRows - 1) / kBlockRows;
    }
    return interleave ? blocks : (rows + kBlockRows - 1) / kBlockRows;
  }

  // The row of some part, or false where there is only padding.
  bool find(size_t block, size_t row, const MatrixPart** part, size_t* part_row) const {
    if (interleave) {
      *part = &parts[block % parts.size()];
      *part_row = block / parts.size() * kBlockRows + row;
      return *part_row < (*part)->rows;
    }
    size_t at = block * kBlockRows + row;
    for (const MatrixPart& p : parts) {
      if (at < p.rows) {
        *part = &p;
        *part_row = at;
        return true;
      }
      at -= p.rows;
    }
    return false;
  }
};

}  // namespace

void pack_matrix(Format format, const std::vector<MatrixPart>& parts, bool interleave, size_t cols, uint8_t* out,
                 int num_threads) {
  const Rows rows{parts, interleave};
  const size_t blocks = rows.blocks(), stride = block_bytes(format, cols);
  std::atomic<size_t> next{0}, not_finite{0};
  const auto work = [&] {
    std::vector<float> x(padded_cols(format, cols));
    for (size_t b; (b = next.fetch_add(1)) < blocks;) {
      uint8_t* block = out + b * stride;
      std::memset(block, 0, stride);
      for (size_t r = 0; r < kBlockRows; ++r) {
        const MatrixPart* part;
        size_t part_row;
        std::fill(x.begin(), x.end(), 0.0f);
        if (rows.find(b, r, &part, &part_row)) load_row(*part, part_row, cols, x.data());
        for (float& v : x)
          if (!std::isfinite(v)) {
            not_finite.fetch_add(1);
            v = 0;
          }
        pack_row(format, cols, x.data(), r, block);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
  if (not_finite) throw std::invalid_argument("holds values that are not finite numbers");
}

void unpack_matrix(Format format, const uint8_t* packed, size_t rows, size_t cols, float* out) {
  const size_t stride = block_bytes(format, cols), padded = padded_cols(format, cols);
  std::vector<float> x(padded);
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* block = packed + row / kBlockRows * stride;
    const size_t r = row % kBlockRows;
    const uint8_t* values = block + header_bytes(format, cols);
    float row_scale = 0;
    if (is_quantized(format)) std::memcpy(&row_scale, block + r * 4, 4);
    for (size_t k = 0; k < padded; ++k) {
      const size_t step = k / 4, byte = r * 4 + k % 4;
      if (format == Format::kF32) {
        std::memcpy(&x[k], block + k * kStepBytes + r * 4, 4);
        continue;
      }
      if (format == Format::kBF16) {
        uint16_t half;
        std::memcpy(&half, block + k / 2 * kStepBytes + r * 4 + k % 2 * 2, 2);
        x[k] = from_bf16(half);
        continue;
      }
      int u;
      if (format == Format::kInt8) {
        u = values[step * kStepBytes + byte];
      } else if (format == Format::kInt4) {
        u = kInt4Codebook[values[step / 2 * kStepBytes + byte] >> (step % 2 * 4) & 15];
      } else {
        const uint8_t* group = values + step_bytes(format, step / kGroupSteps * kGroupSteps);
        const size_t s = step % kGroupSteps;
        u = 4 * ((group[s / 2 * kStepBytes + byte] >> (s % 2 * 4) & 15) |
                 (group[(kGroupSteps / 2 + s / 4) * kStepBytes + byte] >> (s % 4 * 2) & 3) << 4);
      }
      const auto code = static_cast<int8_t>(block[64 + k / weight_group(format) * kBlockRows + r]);
      x[k] = row_scale * static_cast<float>(code) * static_cast<float>(u - 128);
    }
    if (is_transformed(format))
      for (size_t k = 0; k < padded; k += kGroup) hadamard(x.data() + k);
    std::memcpy(out + row * cols, x.data(), cols * sizeof(float));
  }
}

}  // namespace llmb
