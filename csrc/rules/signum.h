#pragma once

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Bernstein et al. 2018, algorithm 2 (Signum), with decoupled weight decay.
struct Signum : DecoupledDecay {
  static constexpr const char* kName = "signum";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", Role::kSigned}};
  static constexpr OptionSpec kOptions[] = {{"float", "momentum", kAmount}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float momentum, grad_weight;  // the latter is (1 - momentum) * grad_factor
    float minus_step, decay;      // -lr, 1 - lr * weight_decay
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(option[0]), to_float((1 - option[0]) * x.grad_factor), to_float(-x.lr),
            to_float(1 - x.lr * option[1])};
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F /*p*/, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.momentum), s[0], F(h.grad_weight) * g);
    return sign_of(s[0]);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[0];
  }
};

BNBOPS_NAMESPACE_END
