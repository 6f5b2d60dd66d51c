// What the machine itself can do, apart from any model: the bounds that a decode or a prefill cannot pass.
#pragma once

#include <cstddef>
#include <optional>

namespace llmb {

enum class DotKind { kInt8, kBF16, kF32 };

// Bytes a second that `threads` threads together read from a buffer of `bytes`, best of a few sweeps. The
// buffer has to be larger than the last-level cache for this to be the memory's bandwidth. Throws
// std::bad_alloc.
double probe_bandwidth(int threads, size_t bytes);

// Multiplications and additions a second of `threads` threads, operands in registers, with the widest
// instructions that the processor has for this kind. Nothing where it has none for bfloat16.
std::optional<double> probe_dot_rate(DotKind kind, int threads);

}  // namespace llmb
