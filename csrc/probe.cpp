#include "probe.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmb {
namespace {

using Clock = std::chrono::steady_clock;

// Runs work(thread) on all threads, in rounds that end together; seconds of the shortest round. The first
// round is not counted: it touches memory and wakes the clock up.
template <class Work>
double shortest_round(int threads, int rounds, const Work& work) {
  std::vector<Clock::time_point> ends;
  ends.reserve(rounds + 1);
  std::barrier round_end(threads, [&]() noexcept { ends.push_back(Clock::now()); });
  auto run = [&](int thread) {
    for (int round = 0; round <= rounds; ++round) {
      work(thread, round);
      round_end.arrive_and_wait();
    }
  };
  {
    std::vector<std::jthread> team;
    for (int thread = 1; thread < threads; ++thread) team.emplace_back(run, thread);
    run(0);
  }
  Clock::duration best = Clock::duration::max();
  for (int round = 1; round <= rounds; ++round) best = std::min(best, ends[round] - ends[round - 1]);
  return std::chrono::duration<double>(best).count();
}

// ---- reading memory

constexpr size_t kReadWords = 32;  // of one iteration: a multiple of every vector

void read_generic(const uint64_t* words, size_t count) {
  uint64_t sums[kReadWords] = {};
  for (size_t i = 0; i < count; i += kReadWords)
    for (size_t k = 0; k < kReadWords; ++k) sums[k] += words[i + k];
  asm volatile("" : : "r"(sums) : "memory");
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void read_avx512(const uint64_t* words, size_t count) {
  __m512i sums[kReadWords / 8] = {};
  for (size_t i = 0; i < count; i += kReadWords)
    for (size_t k = 0; k < kReadWords / 8; ++k)
      sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(words + i + 8 * k));
  for (__m512i& sum : sums) asm volatile("" : : "x"(sum));
}
#endif

auto widest_read() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
#endif
  return read_generic;
}

// ---- dot rates

struct DotLoop {
  void (*run)();
  int lanes;  // multiply-accumulates of one iteration
};

constexpr int kIterations = 100'000;
constexpr int kGenericLanes = 256;

// Plain C++, from the first-level cache; partial sums, so that the compiler may use vectors.
template <class Operand, class Sum>
void generic_loop() {
  constexpr int kSums = 16;
  Operand a[kGenericLanes], b[kGenericLanes];
  std::fill_n(a, kGenericLanes, Operand(3));
  std::fill_n(b, kGenericLanes, Operand(-5));
  Sum sum[kSums] = {};
  for (int i = 0; i < kIterations; ++i) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int j = 0; j < kGenericLanes; j += kSums)
      for (int k = 0; k < kSums; ++k) sum[k] += Sum(a[j + k]) * Sum(b[j + k]);
  }
  asm volatile("" : : "r"(sum) : "memory");
}

#if defined(__x86_64__)

// Independent chains of one instruction, enough of them to hide its latency.
constexpr int kChains = 12;

// The compiler must not see that all chains are the same, nor that nobody wants the sums.
#define LLMB_DOT_LOOP(name, features, Vector, Operand, a_value, b_value, step) \
  __attribute__((target(features))) void name() {                              \
    const Operand a = a_value, b = b_value;                                    \
    Vector sums[kChains] = {};                                                 \
    for (Vector& sum : sums) asm volatile("" : "+x"(sum));                     \
    for (int i = 0; i < kIterations; ++i) {                                    \
      _Pragma("GCC unroll 12") for (Vector& sum : sums) sum = step;            \
    }                                                                          \
    for (Vector& sum : sums) asm volatile("" : : "x"(sum));                    \
  }

LLMB_DOT_LOOP(int8_avx512_vnni, "avx512f,avx512vnni", __m512i, __m512i, _mm512_set1_epi8(3),
              _mm512_set1_epi8(-5), _mm512_dpbusd_epi32(sum, a, b))
LLMB_DOT_LOOP(int8_avx2, "avx2", __m256i, __m256i, _mm256_set1_epi8(3), _mm256_set1_epi8(-5),
              _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(a, sum), b), a)))
LLMB_DOT_LOOP(bf16_avx512, "avx512f,avx512bf16", __m512, __m512bh,
              _mm512_cvtne2ps_pbh(_mm512_set1_ps(3), _mm512_set1_ps(3)),
              _mm512_cvtne2ps_pbh(_mm512_set1_ps(-5), _mm512_set1_ps(-5)), _mm512_dpbf16_ps(sum, a, b))
LLMB_DOT_LOOP(f32_avx512, "avx512f", __m512, __m512, _mm512_set1_ps(3), _mm512_set1_ps(-5),
              _mm512_fmadd_ps(a, b, sum))
LLMB_DOT_LOOP(f32_fma, "avx2,fma", __m256, __m256, _mm256_set1_ps(3), _mm256_set1_ps(-5),
              _mm256_fmadd_ps(a, b, sum))

#endif

std::optional<DotLoop> widest_loop(DotKind kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (kind) {
    case DotKind::kInt8:
      if (__builtin_cpu_supports("avx512vnni")) return DotLoop{int8_avx512_vnni, 64 * kChains};
      if (__builtin_cpu_supports("avx2")) return DotLoop{int8_avx2, 32 * kChains};
      break;
    case DotKind::kBF16:
      if (__builtin_cpu_supports("avx512bf16")) return DotLoop{bf16_avx512, 32 * kChains};
      break;
    case DotKind::kF32:
      if (__builtin_cpu_supports("avx512f")) return DotLoop{f32_avx512, 16 * kChains};
      if (__builtin_cpu_supports("fma")) return DotLoop{f32_fma, 8 * kChains};
      break;
  }
#endif
  switch (kind) {
    case DotKind::kInt8:
      return DotLoop{generic_loop<int8_t, int32_t>, kGenericLanes};
    case DotKind::kBF16:
      return std::nullopt;
    case DotKind::kF32:
      return DotLoop{generic_loop<float, float>, kGenericLanes};
  }
  return std::nullopt;
}

}  // namespace

double probe_bandwidth(int threads, size_t bytes) {
  // A round reads one piece, so that it is short enough to fall between other programs' turns; when a piece's
  // turn comes again, the others have pushed it out of the caches.
  constexpr size_t kPieces = 8, kSweeps = 6;
  const size_t piece =
      bytes / sizeof(uint64_t) / threads / kPieces / kReadWords * kReadWords;  // words of a thread
  const auto buffer = std::make_unique_for_overwrite<uint64_t[]>(piece * kPieces * threads);
  const auto read = widest_read();
  const double seconds = shortest_round(threads, kPieces * kSweeps, [&](int thread, int round) {
    uint64_t* mine = buffer.get() + piece * kPieces * thread;
    if (round == 0) {  // written by the thread that will read it, so that it lies in that thread's memory
      std::fill_n(mine, piece * kPieces, uint64_t(thread) + 1);
    } else {
      read(mine + piece * (round % kPieces), piece);
    }
  });
  return double(piece) * threads * sizeof(uint64_t) / seconds;
}

std::optional<double> probe_dot_rate(DotKind kind, int threads) {
  const std::optional<DotLoop> loop = widest_loop(kind);
  if (!loop) return std::nullopt;
  const double seconds = shortest_round(threads, 200, [&](int, int) { loop->run(); });
  return 2.0 * loop->lanes * kIterations * threads / seconds;
}

}  // namespace llmb
