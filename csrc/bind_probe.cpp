#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <string>

#include "probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llmb {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxMegabytes = 1 << 20;

void check_range(const char* name, int value, int most) {
  if (value >= 1 && value <= most) return;
  const std::string allowed = "; allowed: 1 to " + std::to_string(most);
  throw nb::value_error((name + (" is " + std::to_string(value)) + allowed).c_str());
}

DotKind dot_kind(const std::string& name) {
  if (name == "int8") return DotKind::kInt8;
  if (name == "bf16") return DotKind::kBF16;
  if (name == "fp32") return DotKind::kF32;
  throw nb::value_error(("kind is '" + name + "'; allowed: int8, bf16, fp32").c_str());
}

}  // namespace

void bind_probe(nb::module_& m) {
  m.def(
      "probe_bandwidth",
      [](int threads, int megabytes) {
        check_range("threads", threads, kMaxThreads);
        check_range("megabytes", megabytes, kMaxMegabytes);
        nb::gil_scoped_release release;
        return probe_bandwidth(threads, size_t(megabytes) << 20);
      },
      "threads"_a, "megabytes"_a,
      "Bytes a second that the threads together read from a buffer of that size.");
  m.def(
      "probe_dot_rate",
      [](const std::string& kind, int threads) {
        const DotKind dot = dot_kind(kind);
        check_range("threads", threads, kMaxThreads);
        nb::gil_scoped_release release;
        return probe_dot_rate(dot, threads);
      },
      "kind"_a, "threads"_a,
      "Multiplications and additions a second of int8, bf16 or fp32 dot products with operands in "
      "registers;\n"
      "None where the processor has no instruction for bf16.");
}

}  // namespace llmb
