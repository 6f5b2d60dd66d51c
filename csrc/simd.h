// One vocabulary of vector operations for every instruction set; the kernels are written once on top of it.
//
// A 64-byte step of the packed layout is kParts native vectors. Included only by kernels.cpp, which is
// compiled once an instruction set with LLMB_ISA naming the namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmb::LLMB_ISA {

// Before a loop over the accumulators of a tile: they must become registers.
#define LLMB_UNROLL _Pragma("GCC unroll 32")

// Nearest even. A NaN stays one; without a branch, so that loops vectorise.
static inline uint16_t bf16_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline float float_from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

#if defined(__AVX512F__)

using VF = __m512;
using VI = __m512i;
constexpr int kLanes = 16;
constexpr int kTileBlocks = 4;  // blocks of 16 rows in a full tile: 6 x 4 accumulators of 32 registers
constexpr int kTileRows = 6;
constexpr bool kUnsignedWeights =
    true;  // the dot takes u8 weights as they are; the caller adds -128 * sum(a)

static inline VF load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, VF v) { _mm512_storeu_ps(p, v); }
static inline VF set1(float x) { return _mm512_set1_ps(x); }
static inline VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
static inline VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
static inline VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
static inline VF div(VF a, VF b) { return _mm512_div_ps(a, b); }
static inline VF vmax(VF a, VF b) { return _mm512_max_ps(a, b); }
static inline VF vmin(VF a, VF b) { return _mm512_min_ps(a, b); }
static inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
static inline VF vabs(VF a) { return _mm512_abs_ps(a); }
static inline float reduce_add(VF a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(VF a) { return _mm512_reduce_max_ps(a); }
static inline VI iset1(int32_t x) { return _mm512_set1_epi32(x); }
static inline VI iadd(VI a, VI b) { return _mm512_add_epi32(a, b); }
static inline VI shift_left23(VI a) { return _mm512_slli_epi32(a, 23); }
static inline VF as_float(VI a) { return _mm512_castsi512_ps(a); }
static inline VI as_int(VF a) { return _mm512_castps_si512(a); }
static inline VF to_float(VI a) { return _mm512_cvtepi32_ps(a); }
static inline VI round_to_int(VF a) { return _mm512_cvtps_epi32(a); }
static inline int32_t reduce_iadd(VI a) { return _mm512_reduce_add_epi32(a); }
static inline VI load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline VF load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline VF load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline void store_i8(int8_t* p, VI v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
static inline void store_i16(int16_t* p, VI v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
static inline VI load_i8_pairs(const uint8_t* p) {  // pairs of int8 as pairs of int16
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline VI broadcast4(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
// As assembly, because GCC 12 copies every accumulator of the intrinsics to the stack and back, at half the
// speed.
static inline VI dot_int8(VI acc, VI w, VI a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
}
static inline VI dot_int16(VI acc, VI w, VI a) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
}
#if defined(__AVX512BF16__)
static inline VF dot_bf16(VF acc, VI w, VI a) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
}
#else
static inline VF dot_bf16(VF acc, VI w, VI a) {
  const VI high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  acc = fma(as_float(_mm512_slli_epi32(w, 16)), as_float(_mm512_slli_epi32(a, 16)), acc);
  return fma(as_float(_mm512_and_si512(w, high)), as_float(_mm512_and_si512(a, high)), acc);
}
#endif
// The two steps that 64 bytes of nibbles hold, as u8 values of the codebook.
struct Nibbles {
  VI codebook;
  explicit Nibbles(const uint8_t* table)
      : codebook(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}
  VI low(VI x) const { return _mm512_shuffle_epi8(codebook, _mm512_and_si512(x, _mm512_set1_epi8(15))); }
  VI high(VI x) const {
    return _mm512_shuffle_epi8(codebook, _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)));
  }
};
static inline void store_bytes(uint8_t* p, VI v) { _mm512_storeu_si512(p, v); }
static inline VI bits_and(VI a, uint8_t mask) {
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask)));
}
static inline VI bits_or(VI a, VI b) { return _mm512_or_si512(a, b); }
template <int N>
static inline VI bits_left(VI a) {
  return _mm512_slli_epi16(a, N);
}
template <int N>
static inline VI bits_right(VI a) {
  return _mm512_srli_epi16(a, N);
}

#elif defined(__AVX2__)

using VF = __m256;
using VI = __m256i;
constexpr int kLanes = 8;
constexpr int kTileBlocks = 1;
constexpr int kTileRows = 6;
constexpr bool kUnsignedWeights = false;

static inline VF load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, VF v) { _mm256_storeu_ps(p, v); }
static inline VF set1(float x) { return _mm256_set1_ps(x); }
static inline VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
static inline VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
static inline VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
static inline VF div(VF a, VF b) { return _mm256_div_ps(a, b); }
static inline VF vmax(VF a, VF b) { return _mm256_max_ps(a, b); }
static inline VF vmin(VF a, VF b) { return _mm256_min_ps(a, b); }
static inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
static inline VF vabs(VF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline float reduce_add(VF a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float reduce_max(VF a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline VI iset1(int32_t x) { return _mm256_set1_epi32(x); }
static inline VI iadd(VI a, VI b) { return _mm256_add_epi32(a, b); }
static inline VI shift_left23(VI a) { return _mm256_slli_epi32(a, 23); }
static inline VF as_float(VI a) { return _mm256_castsi256_ps(a); }
static inline VI as_int(VF a) { return _mm256_castps_si256(a); }
static inline VF to_float(VI a) { return _mm256_cvtepi32_ps(a); }
static inline VI round_to_int(VF a) { return _mm256_cvtps_epi32(a); }
static inline int32_t reduce_iadd(VI a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
static inline VI load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline VF load_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline VF load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline void store_i8(int8_t* p, VI v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
static inline void store_i16(int16_t* p, VI v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
static inline VI load_i8_pairs(const uint8_t* p) {  // pairs of int8 as pairs of int16
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline VI broadcast4(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
// |w| <= 127 keeps each pair of products within int16, so vpmaddubsw cannot saturate: 2 * 127 * 127 = 32258.
static inline VI dot_int8(VI acc, VI w, VI a) {
  const VI s = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  const VI pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(a, s));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline VI dot_int16(VI acc, VI w, VI a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }
static inline VF dot_bf16(VF acc, VI w, VI a) {
  const VI high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  acc = fma(as_float(_mm256_slli_epi32(w, 16)), as_float(_mm256_slli_epi32(a, 16)), acc);
  return fma(as_float(_mm256_and_si256(w, high)), as_float(_mm256_and_si256(a, high)), acc);
}
struct Nibbles {
  VI codebook;
  explicit Nibbles(const uint8_t* table)
      : codebook(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}
  VI low(VI x) const { return _mm256_shuffle_epi8(codebook, _mm256_and_si256(x, _mm256_set1_epi8(15))); }
  VI high(VI x) const {
    return _mm256_shuffle_epi8(codebook, _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)));
  }
};
static inline void store_bytes(uint8_t* p, VI v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
static inline VI bits_and(VI a, uint8_t mask) {
  return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask)));
}
static inline VI bits_or(VI a, VI b) { return _mm256_or_si256(a, b); }
template <int N>
static inline VI bits_left(VI a) {
  return _mm256_slli_epi16(a, N);
}
template <int N>
static inline VI bits_right(VI a) {
  return _mm256_srli_epi16(a, N);
}

#else  // plain C++: 16-byte vectors of the compiler (SSE2, NEON, ...)

typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileBlocks = 1;
constexpr int kTileRows = 2;
constexpr bool kUnsignedWeights = false;

static inline VF load(const float* p) {
  VF v;
  std::memcpy(&v, p, 16);
  return v;
}
static inline void store(float* p, VF v) { std::memcpy(p, &v, 16); }
static inline VF set1(float x) { return VF{x, x, x, x}; }
static inline VF add(VF a, VF b) { return a + b; }
static inline VF sub(VF a, VF b) { return a - b; }
static inline VF mul(VF a, VF b) { return a * b; }
static inline VF div(VF a, VF b) { return a / b; }
static inline VF vmax(VF a, VF b) { return a > b ? a : b; }
static inline VF vmin(VF a, VF b) { return a < b ? a : b; }
static inline VF fma(VF a, VF b, VF c) { return a * b + c; }
static inline VF vabs(VF a) { return a < 0.0f ? -a : a; }
static inline float reduce_add(VF a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float reduce_max(VF a) { return std::fmax(std::fmax(a[0], a[2]), std::fmax(a[1], a[3])); }
static inline VI iset1(int32_t x) { return VI{x, x, x, x}; }
static inline VI iadd(VI a, VI b) { return a + b; }
static inline VI shift_left23(VI a) { return a << 23; }
static inline VF as_float(VI a) { return reinterpret_cast<VF>(a); }
static inline VI as_int(VF a) { return reinterpret_cast<VI>(a); }
static inline VF to_float(VI a) { return __builtin_convertvector(a, VF); }
// Nearest even, through the addition of 1.5 * 2^23: |a| < 2^22. Beyond it, and for NaN, any integer.
static inline VI round_to_int(VF a) {
  typedef uint32_t Wrapping __attribute__((vector_size(16)));
  const VF magic = set1(12582912.0f);
  return reinterpret_cast<VI>(reinterpret_cast<Wrapping>(a + magic) - reinterpret_cast<Wrapping>(magic));
}
static inline int32_t reduce_iadd(VI a) { return a[0] + a[1] + a[2] + a[3]; }
static inline VI load_bytes(const uint8_t* p) {
  VI v;
  std::memcpy(&v, p, 16);
  return v;
}
static inline VF load_i8(const uint8_t* p) {
  int8_t x[4];
  std::memcpy(x, p, 4);
  return VF{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]),
            static_cast<float>(x[3])};
}
static inline VF load_bf16(const uint16_t* p) {
  return VF{float_from_bf16(p[0]), float_from_bf16(p[1]), float_from_bf16(p[2]), float_from_bf16(p[3])};
}
static inline void store_i8(int8_t* p, VI v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(v[i]);
}
static inline void store_i16(int16_t* p, VI v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int16_t>(v[i]);
}
static inline VI load_i8_pairs(const uint8_t* p) {  // pairs of int8 as pairs of int16
  int8_t x[8];
  int16_t pairs[8];
  std::memcpy(x, p, 8);
  for (int i = 0; i < 8; ++i) pairs[i] = x[i];
  VI v;
  std::memcpy(&v, pairs, 16);
  return v;
}
static inline VI broadcast4(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return iset1(x);
}
static inline VI dot_int8(VI acc, VI w, VI a) {  // one product of each lane's four a time
  const VI s = w ^ static_cast<int32_t>(0x80808080u);
  acc += (s << 24 >> 24) * (a << 24 >> 24);
  acc += (s << 16 >> 24) * (a << 16 >> 24);
  acc += (s << 8 >> 24) * (a << 8 >> 24);
  return acc + (s >> 24) * (a >> 24);
}
static inline VI dot_int16(VI acc, VI w, VI a) {
  acc += (w << 16 >> 16) * (a << 16 >> 16);
  return acc + (w >> 16) * (a >> 16);
}
static inline VF dot_bf16(VF acc, VI w, VI a) {
  const int32_t high = static_cast<int32_t>(0xffff0000u);
  acc = fma(as_float(w << 16), as_float(a << 16), acc);
  return fma(as_float(w & high), as_float(a & high), acc);
}
struct Nibbles {
  const uint8_t* codebook;
  explicit Nibbles(const uint8_t* table) : codebook(table) {}
  VI low(VI x) const { return look_up(x & 0x0f0f0f0f); }
  VI high(VI x) const { return look_up((x >> 4) & 0x0f0f0f0f); }
  VI look_up(VI x) const {
    uint8_t bytes[16];
    std::memcpy(bytes, &x, 16);
    for (uint8_t& b : bytes) b = codebook[b];
    return load_bytes(bytes);
  }
};
static inline void store_bytes(uint8_t* p, VI v) { std::memcpy(p, &v, 16); }
static inline VI bits_and(VI a, uint8_t mask) { return a & static_cast<int32_t>(0x01010101u * mask); }
static inline VI bits_or(VI a, VI b) { return a | b; }
template <int N>
static inline VI bits_left(VI a) {
  return a << N;
}
template <int N>
static inline VI bits_right(VI a) {
  return a >> N;
}

#endif

// The six-bit values of step 4i + J as 4 * value, from their nibble vector and their vector of pairs of bits.
template <int J>
static inline VI six_bits(VI nibbles, VI pairs) {
  const VI low = J % 2 ? bits_right<2>(nibbles) : bits_left<2>(nibbles);
  const VI high = J == 3 ? pairs : bits_left<6 - 2 * J>(pairs);
  return bits_or(bits_and(low, 0x3c), bits_and(high, 0xc0));
}

constexpr int kParts = 16 / kLanes;  // native vectors in a 64-byte step
constexpr int kVectorBytes = kLanes * 4;

// The lanes i and i ^ H of v become their sum and difference.
template <int H, int... I>
static inline VF butterfly(VF v, std::integer_sequence<int, I...>) {
  const VF sign = {(I & H ? -1.0f : 1.0f)...};
  return fma(v, sign, (VF)__builtin_shufflevector(v, v, (I ^ H)...));
}

// The Walsh-Hadamard transform of the N vectors' elements, in place, not normalised. Sums and differences are
// rounded alike on every instruction set.
template <int N>
static inline void hadamard(VF (&v)[N]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  LLMB_UNROLL for (int i = 0; i < N; ++i) {
    v[i] = butterfly<2>(butterfly<1>(v[i], lanes), lanes);
    if constexpr (kLanes > 4) v[i] = butterfly<4>(v[i], lanes);
    if constexpr (kLanes > 8) v[i] = butterfly<8>(v[i], lanes);
  }
  LLMB_UNROLL for (int h = 1; h < N; h *= 2) LLMB_UNROLL for (int i = 0; i < N; ++i) {
    if (i & h) continue;
    const VF a = v[i], b = v[i + h];
    v[i] = add(a, b);
    v[i + h] = sub(a, b);
  }
}

// exp(x) to about 2 units in the last place for x in [-87, 88]; below, exactly zero is not needed: it
// underflows to ~1e-38.
static inline VF vexp(VF x) {
  x = vmin(vmax(x, set1(-87.0f)), set1(88.0f));
  const VI n = round_to_int(mul(x, set1(1.44269504088896341f)));
  const VF nf = to_float(n);
  VF r = fma(nf, set1(-0.693359375f), x);  // ln 2 in two parts (Cody and Waite)
  r = fma(nf, set1(2.12194440e-4f), r);
  VF p = set1(1.0f / 5040.0f);  // Taylor's series: |r| <= ln(2) / 2
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return mul(p, as_float(shift_left23(iadd(n, iset1(127)))));
}

// 2^x for x <= 0 by Taylor's series: degree 7 errs by 1e-8, degree 5 by 3e-6. Below 2^-126 is 2^-126; a NaN
// stays.
template <int Degree>
static inline VF vexp2(VF x) {
  constexpr float kTerms[] = {1.0f,          0.693147181f,   0.240226507f,   0.0555041087f,
                              0.0096181291f, 0.00133335581f, 1.54035304e-4f, 1.52527338e-5f};
  const VF magic = set1(12582912.0f + 127.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = vmax(set1(-126.0f), x);
  const VF n = add(x, magic), f = sub(x, sub(n, magic));
  VF p = set1(kTerms[Degree]);
  LLMB_UNROLL for (int i = Degree - 1; i >= 0; --i) p = fma(p, f, set1(kTerms[i]));
  return mul(p, as_float(shift_left23(as_int(n))));
}

static inline VF silu(VF x) { return div(x, add(set1(1.0f), vexp(sub(set1(0.0f), x)))); }

static inline float sum_of_squares(const float* x, size_t n) {
  VF sum = set1(0.0f);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF v = load(x + i);
    sum = fma(v, v, sum);
  }
  float total = reduce_add(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

}  // namespace llmb::LLMB_ISA
