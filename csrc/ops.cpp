// Every operator's schema.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "optimizer.h"
#include "rules.h"

namespace bnbops {
namespace {

std::string isa() { return cpu::isa().name; }

// The operators made from the table of rules, for whoever must treat them alike (the fake kernels).
template <class... Rules>
std::vector<std::string> step_ops(RuleList<Rules...>) {
  return {step_names<Rules>().op...};
}
std::vector<std::string> all_step_ops() { return step_ops(AllRules{}); }

template <class... Rules>
void define_steps(torch::stable::detail::StableLibrary& m, RuleList<Rules...>) {
  (m.def(step_schema<Rules>().c_str()), ...);
}

}  // namespace
}  // namespace bnbops

STABLE_TORCH_LIBRARY(bnbops, m) {
  m.def("isa() -> str");
  m.def("step_ops() -> str[]");
  m.def("quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)");
  m.def("dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, *, "
      "Tensor(a!) out) -> ()");
  bnbops::define_steps(m, bnbops::AllRules{});
}

STABLE_TORCH_LIBRARY_IMPL(bnbops, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&bnbops::isa));
  m.impl("step_ops", TORCH_BOX(&bnbops::all_step_ops));
}
