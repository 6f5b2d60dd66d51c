// The values that a quantised weight can take, in units of its scale, for the packer and the calibrated
// method.
#pragma once

#include <algorithm>

#include "layout.h"

// The searches are compiled for each width of vector; without contraction (-ffp-contract=off) all give the
// same bytes.
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_THREAD__)
#define LLMB_EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LLMB_EVERY_WIDTH
#endif

namespace llmb {

// Groups smaller than this count as zero, so that no scale is ever denormal.
constexpr float kTiny = 1e-30f;

// The nearest integer, ties to even, for |x| < 2^22.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The codebook as signed values, and the midpoints between neighbours.
struct Codebook {
  float value[16], midpoint[15], gap[15];

  constexpr Codebook() : value(), midpoint(), gap() {
    for (int i = 0; i < 16; i++) value[i] = static_cast<float>(kInt4Codebook[i] - 128);
    for (int i = 0; i < 15; i++) {
      midpoint[i] = 0.5f * (value[i] + value[i + 1]);
      gap[i] = value[i + 1] - value[i];
    }
  }
};
constexpr Codebook kCodebook;

// What a weight in units of its scale is rounded to, for formats whose scale is searched for.
struct Int4Levels {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr float kGuesses[] = {0.68f,  0.774f, 0.868f,
                                       0.962f, 1.056f, 1.15f};  // of the largest weight / end
  static constexpr float kEnd = 127;

  static float nearest(float t) {
    float value = kCodebook.value[0];
    for (int i = 0; i < 15; i++) value += t > kCodebook.midpoint[i] ? kCodebook.gap[i] : 0.0f;
    return value;
  }
};

struct Int6Levels {
  static constexpr Format kFormat = Format::kInt6;
  static constexpr float kGuesses[] = {0.94f, 1.0f, 1.06f};
  static constexpr float kEnd = 128;

  static float nearest(float t) { return 4 * std::clamp(round_even(0.25f * t), -32.0f, 31.0f); }
};

struct Int8Levels {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr float kGuesses[] = {1.0f};
  static constexpr float kEnd = 127;

  static float nearest(float t) { return std::clamp(round_even(t), -127.0f, 127.0f); }
};

}  // namespace llmb
