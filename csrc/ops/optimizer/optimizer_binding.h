// The optimizer operators of every device. A device checks the values that the host can read, and does the work:
//   struct Device {
//     static void check_values(const std::string& op, const StepArguments& a);  // `op` begins a message
//     template <class Rule, int kIndex>                                         // kIndex: its position in AllRules
//     static void run(const StepNames& names, const StepArguments& a);
//   };
#pragma once

#include <utility>

#include "ops/optimizer/optimizer.h"
#include "rules/all.h"

namespace bnbops {

template <class Device>
class OptimizerOperators {
 public:
  static void implement(torch::stable::detail::StableLibrary& m) {
    implement_all(m, AllRules{}, std::make_integer_sequence<int, AllRules::kSize>{});
  }

 private:
  template <class Rule, int kIndex, Part kPart>
  static void run(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
    static const StepNames names = names_of<Rule>(kPart);
    StepArguments a = arguments_of(names, stack);
    check_step(names, a);
    Device::check_values("bnbops::" + names.name + ": ", a);
    Device::template run<Rule, kIndex>(names, a);
  }

  template <class Rule, int kIndex>
  static void implement_rule(torch::stable::detail::StableLibrary& m) {
    m.impl(names_of<Rule>(Part::kStep).name.c_str(), &run<Rule, kIndex, Part::kStep>);
    m.impl(names_of<Rule>(Part::kDirection).name.c_str(), &run<Rule, kIndex, Part::kDirection>);
    m.impl(names_of<Rule>(Part::kApply).name.c_str(), &run<Rule, kIndex, Part::kApply>);
  }

  template <class... Rules, int... kIndex>
  static void implement_all(torch::stable::detail::StableLibrary& m, RuleList<Rules...>,
                            std::integer_sequence<int, kIndex...>) {
    (implement_rule<Rules, kIndex>(m), ...);
  }
};

}  // namespace bnbops
