// Optimizer operators, made from the table of rules: one schema, one set of checks and one binding for all of them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "codecs/codec.h"
#include "core/check.h"
#include "core/layout.h"

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
  std::optional<Tensor> held_options;  // takes their place
  bool maximize = false;
  std::optional<Tensor> grad_scale, found_inf;
  std::optional<Tensor> clip, trust;  // a factor for each parameter

  bool quantized() const {
    return std::any_of(absmax.begin(), absmax.end(), [](const auto& list) { return !list.empty(); });
  }
};

// Refuses everything that a caller can get wrong about dtypes, shapes, devices and layouts.
void check_arguments(const StepNames& names, const StepArguments& arguments);

// That, and memory that is written and shared.
void check_step(const StepNames& names, const StepArguments& arguments);

// The layout of parameter i's states: rows where absmax has two dimensions, else flat. Rows of whole blocks are flat.
BlockLayout state_layout(const StepArguments& arguments, size_t i);

template <class Rule>
StepNames names_of(const char* suffix) {
  StepNames names;
  names.op = std::string(Rule::kName) + suffix;
  for (int k = 0; k < Rule::kStates; ++k) {
    names.states.push_back(Rule::kStateSpecs[k].name);
    names.absmax.push_back(std::string(names.states.back()) + "_absmax");
  }
  return names;
}

template <class Rule>
StepNames step_names() {
  return names_of<Rule>("_step_");
}

// Of the operator that gives the squared norms of a rule's directions.
template <class Rule>
StepNames direction_names() {
  return names_of<Rule>("_squared_norms");
}

// The arguments that every operator of a rule has.
template <class Rule>
std::string common_schema(const StepNames& names, bool writes) {
  char alias = 'a';
  const auto list = [&](const std::string& name) {
    return (writes ? std::string("Tensor(") + alias++ + "!)[] " : "Tensor[] ") + name;
  };
  std::string schema = names.op + "(" + list("params") + ", Tensor[] grads";
  for (const auto& state : names.states) schema += ", " + list(state);
  for (const auto& absmax : names.absmax) schema += ", " + list(absmax);
  schema += ", " + list("steps") + ", *, Tensor lr";
  for (const auto& option : Rule::kOptions) schema += std::string(", ") + option.type + " " + option.name;
  return schema + ", bool maximize=False, Tensor? options=None, Tensor? grad_scale=None, ";
}

// adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., *, Tensor lr, float beta1, ...) -> ()
template <class Rule>
std::string step_schema() {
  return common_schema<Rule>(step_names<Rule>(), true) + "Tensor? found_inf=None, Tensor? clip=None" +
         (Rule::kTrust ? ", Tensor? trust=None" : "") + ") -> ()";
}

template <class Rule>
std::string direction_schema() {
  return common_schema<Rule>(direction_names<Rule>(), false) + "Tensor? clip=None) -> Tensor";
}

}  // namespace bnbops
