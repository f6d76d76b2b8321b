#pragma once

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Tieleman & Hinton 2012 (lecture 6e); eps outside the root and coupled weight decay as torch.optim.RMSprop.
struct RmsProp : RuleDefaults {
  static constexpr const char* kName = "rmsprop";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"square_avg", Role::kSignedSquare}};  // the map that bitsandbytes takes
  static constexpr OptionSpec kOptions[] = {
      {"float", "alpha", kRate}, {"float", "eps", kAmount}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, minus_step, alpha, square_weight, eps;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(x.grad_factor), to_float(option[2]),     to_float(-x.lr),
            to_float(option[0]),     to_float(1 - option[0]), to_float(option[1])};
  }

  // The gradient over the root of its mean square.
  template <class F>
  BNBOPS_HD static F normalized(F g, F p, F& square_avg, const Hyper& h) {
    g = fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g);
    square_avg = fused_multiply_add(F(h.alpha), square_avg, F(h.square_weight) * g * g);
    return divide_by_positive(g, square_root(square_avg) + F(h.eps));
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    return normalized(g, p, s[0], h);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[0];
  }
};

// RMSprop whose steps are accumulated with momentum, as torch.optim.RMSprop.
struct RmsPropMomentum : RuleDefaults {
  static constexpr const char* kName = "rmsprop_momentum";
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {RmsProp::kStateSpecs[0], {"momentum_buffer", Role::kSigned}};
  static constexpr OptionSpec kOptions[] = {
      RmsProp::kOptions[0], RmsProp::kOptions[1], RmsProp::kOptions[2], {"float", "momentum", kAmount}};

  struct Hyper : RmsProp::Hyper {
    float momentum;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {RmsProp::prepare(option, x), to_float(option[3])};
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    s[1] = fused_multiply_add(F(h.momentum), s[1], RmsProp::normalized(g, p, s[0], h));
    return s[1];
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[0];
  }
};

BNBOPS_NAMESPACE_END
