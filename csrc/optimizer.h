// Optimizer operators, made from the table of rules: one schema, one set of checks and one binding for all of them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "codecs.h"
#include "layout.h"

namespace bnbops {

struct StepNames {  // what a rule calls things
  std::string op;
  std::vector<const char*> states;  // "exp_avg"
  std::vector<std::string> absmax;  // "exp_avg_absmax"
};

// The arguments of a step, in the order of the schema.
struct StepArguments {
  std::vector<Tensor> params, grads;
  std::vector<std::vector<Tensor>> states, absmax;  // [state][param]; absmax is empty for fp32 states
  std::vector<Tensor> steps;
  std::optional<Tensor> lr;
  std::vector<double> options;
  bool maximize = false;
  std::optional<Tensor> grad_scale, found_inf;

  bool quantized() const {
    return std::any_of(absmax.begin(), absmax.end(), [](const auto& list) { return !list.empty(); });
  }
};

// Refuses everything that a caller can get wrong about dtypes, shapes, devices, layouts and aliases.
void check_step(const StepNames& names, const StepArguments& arguments);

// The layout of parameter i's states: rows where absmax has two dimensions, else flat.
BlockLayout state_layout(const StepArguments& arguments, size_t i);

template <class Rule>
StepNames step_names() {
  StepNames names;
  names.op = std::string(Rule::kName) + "_step_";
  for (const auto& state : Rule::kStateSpecs) {
    names.states.push_back(state.name);
    names.absmax.push_back(std::string(state.name) + "_absmax");
  }
  return names;
}

// adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., *, Tensor lr, float beta1, ...) -> ()
template <class Rule>
std::string step_schema() {
  const StepNames names = step_names<Rule>();
  char alias = 'a';
  const auto written = [&](const std::string& name) { return std::string("Tensor(") + alias++ + "!)[] " + name; };
  std::string schema = names.op + "(" + written("params") + ", Tensor[] grads";
  for (const auto& state : names.states) schema += ", " + written(state);
  for (const auto& absmax : names.absmax) schema += ", " + written(absmax);
  schema += ", " + written("steps") + ", *, Tensor lr";
  for (const auto* option : Rule::kOptionNames) schema += std::string(", float ") + option;
  return schema + ", bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()";
}

}  // namespace bnbops
