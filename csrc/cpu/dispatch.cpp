// Which instruction set this machine gets.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace bnbops::cpu {
namespace {

struct Candidate {
  Isa isa;
  bool supported;
};

Isa choose() {
#ifdef BNBOPS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi");
#endif
  const Candidate candidates[] = {
  // best first
#ifdef BNBOPS_X86
      {{"avx512", &kAvx512Kernels}, avx512},
      {{"avx2", &kAvx2Kernels}, avx2},
#endif
      {{"baseline", &kBaselineKernels}, true},
  };
  const char* wanted = std::getenv("BNBOPS_ISA");
  std::string available;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.isa.name) == 0) return candidate.isa;
    available += std::string(available.empty() ? "" : ", ") + candidate.isa.name;
  }
  throw std::runtime_error("BNBOPS_ISA is '" + std::string(wanted) +
                           "', but this machine and build offer: " + available);
}

}  // namespace

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace bnbops::cpu
