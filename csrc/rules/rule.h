// What an optimizer's update rule is. Each is written once, for the host and for devices, in a file of its family.
//
// A rule is code for one element that knows nothing of blocks, bytes or devices. It names its states and options
// (operator schemas are made of them), turns the options into scalars once a step and parameter (`prepare`), and
// updates one element in fp32. `update` returns its witness: a number that is finite exactly if the result is fit to
// be kept, which it is not where the gradient is not finite. The number type F is float or, on a CPU with SIMD, a
// vector of floats: whatever has the operations of portable.h.
//
// New optimizer: a struct, its row in AllRules (all.h), a class in bnbops/optim, a reference in tests/reference.
#pragma once

#include <limits>

#include "core/portable.h"

BNBOPS_NAMESPACE_BEGIN

struct StateSpec {
  const char* name;
  bool is_signed;           // an 8-bit state takes the signed or the unsigned dynamic map
  bool is_divisor = false;  // a positive value never becomes 0, which the next step would divide by
};

// The values that an option may have: from `from` to below `below`, which "must be ..." tells.
struct Range {
  double from, below;
  const char* text;
  constexpr bool has(double x) const { return x >= from && x < below; }
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Range kRate{0, 1, "in [0, 1)"};                          // a decay rate
constexpr Range kAmount{0, kInfinity, "finite and not negative"};  // eps, weight decay, ...
constexpr Range kNumber{std::numeric_limits<double>::lowest(), kInfinity, "finite"};
constexpr Range kCount{0, kInfinity, "0 or more"};
constexpr Range kFlag{0, 2, "True or False"};

struct OptionSpec {
  const char *type, *name;  // as in a schema: "float", "bool" or "int"
  Range range;
};

// What `prepare` gets beside the options.
struct StepScalars {
  double lr;
  double step;         // counts from 1
  double grad_factor;  // unscales, clips, and negates to maximize
  double trust;        // the parameter's trust ratio; 1 but for rules with kTrust
};

// A rule's states of one element.
template <class F, int kCount>
struct States {
  F value[kCount > 0 ? kCount : 1];
  BNBOPS_HD F& operator[](int k) { return value[k]; }
  BNBOPS_HD const F& operator[](int k) const { return value[k]; }
};

template <class F, class Rule>
using StatesOf = States<F, Rule::kStates>;

template <class Rule>
constexpr int kSlots = Rule::kStates > 0 ? Rule::kStates : 1;  // arrays have a size

BNBOPS_HD float to_float(double x) { return static_cast<float>(x); }

// What most rules have in common.
struct RuleDefaults {
  static constexpr bool kTrust = false;          // no ratio of norms scales the step of a parameter
  static constexpr bool kDirectionNorm = false;  // or it is not made from the norm of `direction`
  // What is wrong with options that are in their ranges but do not go together, or nullptr.
  static const char* conflict(const double* /*option*/) { return nullptr; }
};

// Updates an element whose witness is finite; any other keeps its parameter and states, and the rest of its block goes
// on.
template <class Rule, class F>
BNBOPS_HD void guarded_update(F g, F& p, StatesOf<F, Rule>& s, const typename Rule::Hyper& h) {
  F new_p = p;
  StatesOf<F, Rule> new_s = s;
  const auto valid = is_finite(Rule::update(g, new_p, new_s, h));
  p = select(valid, new_p, p);
  for (int k = 0; k < Rule::kStates; ++k) s[k] = select(valid, new_s[k], s[k]);
}

BNBOPS_NAMESPACE_END
