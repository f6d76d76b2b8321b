// Optimizer operators, made from the table of rules: one schema, one set of checks and one binding for all of them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/layout.h"
#include "ops/optimizer/step_job.h"
#include "rules/rule.h"

namespace bnbops {

struct StepNames {  // what a rule calls things
  Part part;
  std::string op;
  std::vector<StateSpec> states;    // "exp_avg"
  std::vector<std::string> absmax;  // "exp_avg_absmax"
};

// The arguments of a step, in the order of the schema.
struct StepArguments {
  std::vector<Tensor> params, grads, directions;    // by the part of a step, some of them are empty
  std::vector<std::vector<Tensor>> states, absmax;  // [state][param]; absmax is empty for fp32 states
  std::vector<Tensor> steps;
  std::optional<Tensor> lr;
  std::vector<double> options;
  std::optional<Tensor> held_options;  // takes their place
  bool maximize = false;
  std::optional<Tensor> grad_scale, found_inf;
  std::optional<Tensor> clip, trust;  // a factor for each parameter
  std::string codec;                  // a name for all states that have scales, or one for each state: "dynamic8,fp32"
  std::vector<int> codecs;            // of states, by number: what check_step finds

  bool coded(size_t k) const { return !absmax[k].empty(); }
};

// A codec's number by its name; `given` is what a caller has named.
int codec_named(const std::string& op, const std::string& given, const std::string& name);
ScalarType dtype_of_codes(int codec);  // float32 for kUncoded

// Blocks of each row, rows being dimension 0.
BlockLayout row_layout(const Tensor& tensor);
std::vector<int64_t> absmax_shape(const Tensor& tensor, bool flat);

// The scales of a parameter's state, in either layout.
void check_absmax(const Named& absmax, const Tensor& param);

// Refuses everything that a caller can get wrong about dtypes, shapes, devices, layouts, and memory that is written and
// shared. Fills in the codecs.
void check_step(const StepNames& names, StepArguments& arguments);

// The layout of parameter i's states: rows where absmax has two dimensions, else flat. Rows of whole blocks are flat.
BlockLayout state_layout(const StepArguments& arguments, size_t i);

constexpr const char* suffix_of(Part part) {
  return part == Part::kStep ? "_step_" : part == Part::kDirection ? "_direction_" : "_apply_";
}

// Whether the ratio of norms that some rules have is an argument of an operator.
template <class Rule>
constexpr bool takes_trust(Part part) {
  if (part == Part::kStep) return Rule::kTrust != Trust::kNone;
  return Rule::kTrust == (part == Part::kApply ? Trust::kDirection : Trust::kGradient);
}

template <class Rule>
StepNames names_of(Part part) {
  StepNames names{part, {}, {}, {}};
  names.op = std::string(Rule::kName) + suffix_of(part);
  for (int k = 0; k < Rule::kStates && part != Part::kApply; ++k) {
    names.states.push_back(Rule::kStateSpecs[k]);
    names.absmax.push_back(std::string(Rule::kStateSpecs[k].name) + "_absmax");
  }
  return names;
}

// adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., *, Tensor lr, float beta1, ...) -> ()
// adam_direction_(Tensor[] params, Tensor[] grads, Tensor(a!)[] directions, Tensor(b!)[] exp_avg, ..., *, ...) -> ()
// adam_apply_(Tensor(a!)[] params, Tensor[] directions, Tensor[] steps, *, Tensor lr, float beta1, ...) -> ()
template <class Rule>
std::string schema_of(Part part) {
  const StepNames names = names_of<Rule>(part);
  char alias = 'a';
  const auto list = [&](bool writes, const std::string& name) {
    return (writes ? std::string("Tensor(") + alias++ + "!)[] " : "Tensor[] ") + name;
  };
  const bool grads = part != Part::kApply;
  std::string schema = names.op + "(" + list(part != Part::kDirection, "params");
  if (grads) schema += ", Tensor[] grads";
  if (part != Part::kStep) schema += ", " + list(grads, "directions");
  for (const auto& state : names.states) schema += ", " + list(true, state.name);
  for (const auto& absmax : names.absmax) schema += ", " + list(true, absmax);
  schema += ", " + list(grads, "steps") + ", *, Tensor lr";
  for (const auto& option : Rule::kOptions) schema += std::string(", ") + option.type + " " + option.name;
  schema += ", ";
  if (grads) schema += "bool maximize=False, ";
  schema += "Tensor? options=None";
  if (grads) schema += ", Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? clip=None";
  if (takes_trust<Rule>(part)) schema += ", Tensor? trust=None";
  if (grads) schema += std::string(", str codec=\"") + kDefaultCodec + "\"";
  return schema + ") -> ()";
}

}  // namespace bnbops
