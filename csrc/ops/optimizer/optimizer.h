// Optimizer operators, made from the table of rules: one list of arguments, set of checks and binding for all of them.
#pragma once

#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/stack.h"
#include "ops/optimizer/step_job.h"
#include "rules/all.h"

namespace bnbops {

struct StepNames {  // what a rule's operator is called, and its arguments
  Part part;
  std::string name;
  std::vector<StateSpec> states;    // "exp_avg"
  std::vector<std::string> absmax;  // "exp_avg_absmax"
  std::vector<OptionSpec> options;
  bool takes_trust;                        // the ratio of norms that some rules have
  const char* (*conflict)(const double*);  // of options: RuleDefaults

  Operator op() const { return {name.c_str()}; }
};

// The arguments of a step.
struct StepArguments {
  std::vector<Tensor> params, grads, directions;    // by the part of a step, some of them are empty
  std::vector<std::vector<Tensor>> states, absmax;  // [state][param]; absmax is empty for fp32 states
  std::vector<Tensor> steps;
  OptionalTensor lr;  // always given
  std::vector<double> options;
  OptionalTensor held_options;  // takes their place
  bool maximize = false;
  OptionalTensor grad_scale, found_inf;
  OptionalTensor clip, trust;        // a factor for each parameter
  std::string codec = kUncodedName;  // a name for all states that have scales, or one for each state: "dynamic8,fp32"
  std::vector<int> codecs;           // of states, by number: what check_step finds

  explicit StepArguments(const StepNames& names)
      : states(names.states.size()), absmax(names.states.size()), options(names.options.size()) {}
  bool coded(size_t k) const { return !absmax[k].empty(); }
};

// All arguments in the order of the schema: visit.list(name, tensors, whether they are written) of lists, which have a
// tensor for each parameter, then visit.value(type, name, default or null, value).
template <class Arguments, class Visit>
void each_argument(const StepNames& names, Arguments& a, Visit& visit) {
  const bool grads = names.part != Part::kApply;
  visit.list("params", a.params, names.part != Part::kDirection);
  if (grads) visit.list("grads", a.grads, false);
  if (names.part != Part::kStep) visit.list("directions", a.directions, grads);
  for (size_t k = 0; k < names.states.size(); ++k) visit.list(names.states[k].name, a.states[k], true);
  for (size_t k = 0; k < names.states.size(); ++k) visit.list(names.absmax[k].c_str(), a.absmax[k], true);
  visit.list("steps", a.steps, grads);
  visit.value("Tensor", "lr", nullptr, a.lr);
  for (size_t k = 0; k < names.options.size(); ++k) {
    visit.value(names.options[k].type, names.options[k].name, nullptr, a.options[k]);
  }
  if (grads) visit.value("bool", "maximize", "False", a.maximize);
  visit.value("Tensor?", "options", "None", a.held_options);
  if (grads) visit.value("Tensor?", "grad_scale", "None", a.grad_scale);
  if (grads) visit.value("Tensor?", "found_inf", "None", a.found_inf);
  if (grads) visit.value("Tensor?", "clip", "None", a.clip);
  if (names.takes_trust) visit.value("Tensor?", "trust", "None", a.trust);
  if (grads) visit.value("str", "codec", kDefaultCodec, a.codec);
}

template <class Rule>
StepNames names_of(Part part) {
  constexpr const char* kSuffixes[] = {"_step_", "_direction_", "_apply_"};
  const bool trust = part == Part::kStep
                         ? Rule::kTrust != Trust::kNone
                         : Rule::kTrust == (part == Part::kApply ? Trust::kDirection : Trust::kGradient);
  StepNames names{part,  Rule::kName,   {}, {}, {std::begin(Rule::kOptions), std::end(Rule::kOptions)},
                  trust, Rule::conflict};
  names.name += kSuffixes[static_cast<int>(part)];
  for (int k = 0; k < Rule::kStates && part != Part::kApply; ++k) {
    names.states.push_back(Rule::kStateSpecs[k]);
    names.absmax.push_back(std::string(Rule::kStateSpecs[k].name) + "_absmax");
  }
  return names;
}

// adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., *, Tensor lr, float beta1, ...) -> ()
// adam_direction_(Tensor[] params, Tensor[] grads, Tensor(a!)[] directions, Tensor(b!)[] exp_avg, ..., *, ...) -> ()
// adam_apply_(Tensor(a!)[] params, Tensor[] directions, Tensor[] steps, *, Tensor lr, float beta1, ...) -> ()
std::string schema_of(const StepNames& names);

// What is on the dispatcher's stack.
StepArguments arguments_of(const StepNames& names, StableIValue* values);

// Refuses everything that a caller can get wrong about dtypes, shapes, devices, layouts, memory that is written and
// shared, and options. Fills in the codecs, and the options that a tensor holds.
void check_step(const StepNames& names, StepArguments& arguments);

// One parameter's part of the step; `grad` is in logical order. Blocks are of rows where absmax has two dimensions.
StepJob step_job(const StepArguments& arguments, size_t i, const Tensor& grad);

// A codec's number by its name; `given` is what a caller has named.
int codec_named(const Operator& op, const std::string& given, const std::string& name);
ScalarType dtype_of_codes(int codec);  // float32 for kUncoded

// Blocks of each row, rows being dimension 0.
BlockLayout row_layout(const Tensor& tensor);

// The scales of a parameter's state, in either layout.
void check_absmax(const Argument& absmax, const Tensor& param);

// A device checks the values that the host can read, and does the work:
//   struct Device {
//     static void check_values(const std::string& op, const StepArguments& a);  // `op` begins a message
//     template <class Rule, int kIndex>                                         // kIndex: its position in AllRules
//     static void run(const StepNames& names, const StepArguments& a);
//   };
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
