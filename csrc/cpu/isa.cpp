// The operator that tells which kernels are in use.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"

namespace bnbops::cpu {
namespace {

std::string isa_name() { return isa().name; }

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&bnbops::cpu::isa_name)); }
