#include "isa.h"

#include <stdexcept>

namespace llmb {
namespace {

struct Entry {
  const Kernels& (*kernels)();
  bool available;
};

std::vector<Entry> entries() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return {{avx512_bf16_kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
          {avx512_vnni_kernels, avx512},
          {avx2_kernels, avx2},
          {generic_kernels, true}};
#else
  return {{generic_kernels, true}};
#endif
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Entry& e : entries())
    if (e.available) names.emplace_back(e.kernels().name);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  std::string known;
  for (const Entry& e : entries()) {
    if (!e.available) continue;
    if (isa == e.kernels().name) return e.kernels();
    known += (known.empty() ? "" : ", ") + std::string(e.kernels().name);
  }
  throw std::invalid_argument("instruction set '" + isa +
                              "' is not available on this processor; available: " + known);
}

}  // namespace llmb
