#pragma once

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Duchi, Hazan & Singer 2011, figure 1 (diagonal); lr_decay as torch.optim.Adagrad.
struct Adagrad : RuleDefaults {
  static constexpr const char* kName = "adagrad";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"sum", Role::kSignedSquare}};  // the map that bitsandbytes takes
  static constexpr OptionSpec kOptions[] = {
      {"float", "lr_decay", kAmount}, {"float", "eps", kAmount}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, eps;
    float minus_step;  // -lr / (1 + (t - 1) * lr_decay)
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(x.grad_factor), to_float(option[2]), to_float(option[1]),
            to_float(-x.lr / (1 + (x.step - 1) * option[0]))};
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    g = fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g);
    s[0] = fused_multiply_add(g, g, s[0]);
    return divide_by_positive(g, square_root(s[0]) + F(h.eps));
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[0];
  }
};

BNBOPS_NAMESPACE_END
