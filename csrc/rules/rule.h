// What an optimizer's update rule is. Each is written once, for the host and for devices, in a file of its family.
//
// A rule is code for one element that knows nothing of blocks, bytes or devices. It names its states and options
// (operator schemas are made of them), turns the options into scalars once a step and parameter (`prepare`), and
// updates one element in fp32: `direction` moves the states on and gives the step u, `apply` takes it. `witness` is a
// number that is finite exactly if the result is fit to be kept, which it is not where the gradient is not finite; a
// state that is NaN shows in it or in u. The number type F is float or, on a CPU with SIMD, a vector of floats:
// whatever has the operations of portable.h.
//
// New optimizer: a struct, its row in AllRules (all.h), a class in bnbops/optim, a reference in tests/reference.
#pragma once

#include <limits>

#include "codecs/codec.h"

BNBOPS_NAMESPACE_BEGIN

struct StateSpec {
  const char* name;
  Role role;
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

// What a parameter's trust ratio, which is made of norms, scales.
enum class Trust { kNone, kGradient, kDirection };
constexpr const char* name_of(Trust trust) {
  constexpr const char* kNames[] = {"none", "gradient", "direction"};
  return kNames[static_cast<int>(trust)];
}

// What most rules have in common.
struct RuleDefaults {
  static constexpr Trust kTrust = Trust::kNone;
  // What is wrong with options that are in their ranges but do not go together, or nullptr.
  static const char* conflict(const double* /*option*/) { return nullptr; }

  // The step along a direction.
  template <class F, class Hyper>
  BNBOPS_HD static F apply(F p, F u, const Hyper& h) {
    return fused_multiply_add(F(h.minus_step), u, p);
  }
};

// Of rules whose weight decay shrinks the parameter beside the step: `decay` is 1 - lr * weight_decay.
struct DecoupledDecay : RuleDefaults {
  template <class F, class Hyper>
  BNBOPS_HD static F apply(F p, F u, const Hyper& h) {
    return fused_multiply_add(F(h.minus_step), u, p * F(h.decay));
  }
};

// Updates an element whose witness is finite; any other keeps its parameter and states, and the rest of its block goes
// on.
template <class Rule, class F>
BNBOPS_HD void guarded_update(F g, F& p, StatesOf<F, Rule>& s, const typename Rule::Hyper& h) {
  StatesOf<F, Rule> new_s = s;
  const F u = Rule::direction(g, p, new_s, h);
  const auto valid = is_finite(Rule::witness(new_s, u));
  p = select(valid, Rule::apply(p, u, h), p);
  for (int k = 0; k < Rule::kStates; ++k) s[k] = select(valid, new_s[k], s[k]);
}

// The first half of that: the direction, NaN for an element that is left alone.
template <class Rule, class F>
BNBOPS_HD F guarded_direction(F g, F p, StatesOf<F, Rule>& s, const typename Rule::Hyper& h) {
  StatesOf<F, Rule> new_s = s;
  const F u = Rule::direction(g, p, new_s, h);
  const auto valid = is_finite(Rule::witness(new_s, u));
  for (int k = 0; k < Rule::kStates; ++k) s[k] = select(valid, new_s[k], s[k]);
  return select(valid, u, F(float_from_bits(kNanBits)));
}

// And the second half.
template <class Rule, class F>
BNBOPS_HD void guarded_apply(F& p, F u, const typename Rule::Hyper& h) {
  p = select(is_number(u), Rule::apply(p, u, h), p);
}

BNBOPS_NAMESPACE_END
