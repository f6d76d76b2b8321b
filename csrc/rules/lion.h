#pragma once

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Chen et al. 2023, algorithm 2.
struct Lion : DecoupledDecay {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", Role::kSigned}};
  static constexpr OptionSpec kOptions[] = {
      {"float", "beta1", kRate}, {"float", "beta2", kRate}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float beta1, beta2, minus_step;
    float grad_weight1, grad_weight2;  // (1 - beta) * grad_factor
    float decay;                       // 1 - lr * weight_decay
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(option[0]),
            to_float(option[1]),
            to_float(-x.lr),
            to_float((1 - option[0]) * x.grad_factor),
            to_float((1 - option[1]) * x.grad_factor),
            to_float(1 - x.lr * option[2])};
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F /*p*/, States<F, kStates>& s, const Hyper& h) {
    const F interpolated = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight1) * g);
    s[0] = fused_multiply_add(F(h.beta2), s[0], F(h.grad_weight2) * g);
    return sign_of(interpolated);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[0];
  }
};

BNBOPS_NAMESPACE_END
