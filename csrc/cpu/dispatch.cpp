// Which instruction set this machine gets, and the operators that tell.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef BNBOPS_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace bnbops::cpu {
namespace {

#ifdef BNBOPS_X86
// Whether the processor has tiles of bfloat16 and int8, and the system lets this process use them: it saves their large
// state only for who asks.
bool may_use_amx() {
#ifdef __linux__
  constexpr int kAskForState = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmx = 1U << 22 | 1U << 24 | 1U << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> find() {
#ifdef BNBOPS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  const bool amx = avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx();
#endif
  const std::pair<Isa, bool> candidates[] = {
#ifdef BNBOPS_X86
      {{"amx", &kAvx512Kernels, &kAvx512Steps, &kInt8AmxKernels, &kAmxKernels}, amx},
      {{"avx512", &kAvx512Kernels, &kAvx512Steps, &kInt8Avx512Kernels, nullptr}, avx512},
      {{"avx2", &kAvx2Kernels, &kAvx2Steps, &kInt8Avx2Kernels, nullptr}, avx2},
#endif
      {{"baseline", &kBaselineKernels, &kBaselineSteps, &kInt8BaselineKernels, nullptr}, true},
  };
  std::vector<Isa> found;
  for (const auto& [isa, supported] : candidates) {
    if (supported) found.push_back(isa);
  }
  return found;
}

Isa choose() {
  const char* wanted = std::getenv("BNBOPS_ISA");
  std::string names;
  for (const Isa& isa : isas()) {
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, isa.name) == 0) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error("BNBOPS_ISA is '" + std::string(wanted) + "', but this machine and build offer: " + names);
}

std::string isa_name() { return isa().name; }

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  std::reverse(names.begin(), names.end());
  return names;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find();
  return found;
}

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&bnbops::cpu::isa_name));
  m.impl("isas", TORCH_BOX(&bnbops::cpu::isa_names));
}
