// The operators that tell which kernels are in use, and which could be.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace bnbops::cpu {
namespace {

std::string isa_name() { return isa().name; }

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  std::reverse(names.begin(), names.end());
  return names;
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&bnbops::cpu::isa_name));
  m.impl("isas", TORCH_BOX(&bnbops::cpu::isa_names));
}
