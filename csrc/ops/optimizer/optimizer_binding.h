// The optimizer operators of every device. A device checks the values that the host can read, and does the work:
//   struct Device {
//     static void check_values(const std::string& op, const StepArguments& a);  // `op` begins a message
//     template <class Rule, int kIndex>                                         // kIndex: its position in AllRules
//     static void run(const StepNames& names, const StepArguments& a);
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <utility>

#include "core/tensors.h"
#include "ops/optimizer/optimizer.h"
#include "ops/optimizer/step_job.h"
#include "rules/all.h"

namespace bnbops {

// Takes arguments off the dispatcher's stack, one by one.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  double option(const OptionSpec& spec) {
    switch (spec.type[0]) {
      case 'b': return take<bool>();
      case 'i': return static_cast<double>(take<int64_t>());
      default: return take<double>();
    }
  }

 private:
  StableIValue* next_;
};

// The arguments of schema_of.
template <class Rule>
StepArguments arguments_of(Part part, const StepNames& names, StableIValue* values) {
  Arguments stack(values);
  const auto list = [&] { return stack.take<std::vector<Tensor>>(); };
  const auto optional = [&] { return stack.take<std::optional<Tensor>>(); };
  const bool grads = part != Part::kApply;
  StepArguments a;
  a.params = list();
  if (grads) a.grads = list();
  if (part != Part::kStep) a.directions = list();
  for (size_t k = 0; k < names.states.size(); ++k) a.states.push_back(list());
  for (size_t k = 0; k < names.states.size(); ++k) a.absmax.push_back(list());
  a.steps = list();
  a.lr = stack.take<Tensor>();
  for (const auto& option : Rule::kOptions) a.options.push_back(stack.option(option));
  if (grads) a.maximize = stack.take<bool>();
  a.held_options = optional();
  if (grads) a.grad_scale = optional();
  if (grads) a.found_inf = optional();
  if (grads) a.clip = optional();
  if (takes_trust<Rule>(part)) a.trust = optional();
  a.codec = grads ? stack.take<std::string>() : kUncodedName;
  return a;
}

inline StepJob step_job(const StepArguments& a, size_t i, const Tensor& grad) {
  const BlockLayout layout = state_layout(a, i);
  StepJob job{};
  job.param = a.params[i].mutable_data_ptr();
  if (!a.grads.empty()) job.grad = grad.const_data_ptr();
  if (!a.directions.empty()) job.direction = mutable_data<float>(a.directions[i]);
  for (size_t k = 0; k < a.states.size(); ++k) {
    job.state[k] = {a.states[k][i].mutable_data_ptr(), a.coded(k) ? mutable_data<float>(a.absmax[k][i]) : nullptr,
                    a.codecs[k]};
  }
  job.inner = layout.inner;
  job.blocks_per_row = layout.blocks_per_row;
  job.blocks = layout.blocks();
  job.param_dtype = dtype_of(a.params[i]);
  job.grad_dtype = dtype_of(grad);
  return job;
}

template <class Device>
class OptimizerOperators {
 public:
  static void implement(torch::stable::detail::StableLibrary& m) {
    implement_all(m, AllRules{}, std::make_integer_sequence<int, AllRules::kSize>{});
  }

 private:
  // Options in a tensor are no constants of a compiled graph.
  static void use_held_options(StepArguments& a) {
    if (!a.held_options) return;
    const auto* values = data_of<double>(*a.held_options);
    a.options.assign(values, values + a.options.size());
  }

  template <class Rule>
  static void check_values(const StepNames& names, StepArguments& a) {
    use_held_options(a);
    for (size_t i = 0; i < a.options.size(); ++i) {
      const OptionSpec& spec = Rule::kOptions[i];
      BNBOPS_CHECK(spec.range.has(a.options[i]), "bnbops::", names.op, ": ", spec.name, " must be ", spec.range.text,
                   ", got ", a.options[i]);
    }
    const char* conflict = Rule::conflict(a.options.data());
    BNBOPS_CHECK(conflict == nullptr, "bnbops::", names.op, ": ", conflict);
    Device::check_values("bnbops::" + names.op + ": ", a);
  }

  template <class Rule, int kIndex, Part kPart>
  static void run(StableIValue* stack, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
    static const StepNames names = names_of<Rule>(kPart);
    StepArguments a = arguments_of<Rule>(kPart, names, stack);
    check_step(names, a);
    check_values<Rule>(names, a);
    Device::template run<Rule, kIndex>(names, a);
  }

  template <class Rule, int kIndex>
  static void implement_rule(torch::stable::detail::StableLibrary& m) {
    m.impl(names_of<Rule>(Part::kStep).op.c_str(), &run<Rule, kIndex, Part::kStep>);
    m.impl(names_of<Rule>(Part::kDirection).op.c_str(), &run<Rule, kIndex, Part::kDirection>);
    m.impl(names_of<Rule>(Part::kApply).op.c_str(), &run<Rule, kIndex, Part::kApply>);
  }

  template <class... Rules, int... kIndex>
  static void implement_all(torch::stable::detail::StableLibrary& m, RuleList<Rules...>,
                            std::integer_sequence<int, kIndex...>) {
    (implement_rule<Rules, kIndex>(m), ...);
  }
};

}  // namespace bnbops
