// The table of optimizer kernels. Compiled once per instruction set, as kernels.cpp.
#include "cpu/kernels.h"

#include BNBOPS_LANES_HEADER
#include "cpu/step_kernels.h"
#include "rules/all.h"

namespace bnbops {
inline namespace BNBOPS_ISA {
namespace {

template <class Lanes>
constexpr cpu::StepKernels make_kernels() {
  static_assert(AllRules::kSize <= cpu::kMaxRules);
  cpu::StepKernels kernels{{}, encode_states<Lanes>, decode_states<Lanes>};
  for_each_rule(AllRules{}, [&](auto rule, int index) {
    using Rule = decltype(rule);
    static_assert(Rule::kStates <= kMaxStates);
    kernels.parts[0][index] = step<Lanes, Rule>;
    kernels.parts[1][index] = direction<Lanes, Rule>;
    kernels.parts[2][index] = apply<Lanes, Rule>;
  });
  return kernels;
}

}  // namespace
}  // namespace BNBOPS_ISA

namespace cpu {
extern const StepKernels BNBOPS_KERNELS;  // a constant: no code of one instruction set may run at load
constexpr StepKernels BNBOPS_KERNELS = BNBOPS_ISA::make_kernels<BNBOPS_LANES>();
}  // namespace cpu
}  // namespace bnbops
