#pragma once

#include <cmath>

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// You et al. 2020, algorithm 2. The norms behind the trust ratio come from `direction`.
struct Lamb : RuleDefaults {
  static constexpr const char* kName = "lamb";
  static constexpr Trust kTrust = Trust::kDirection;
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", Role::kSigned}, {"exp_avg_sq", Role::kSquare}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},          {"float", "beta2", kRate},
                                            {"float", "eps", kAmount},          {"float", "weight_decay", kAmount},
                                            {"bool", "bias_correction", kFlag}, {"bool", "adam_w_mode", kFlag}};

  struct Hyper {
    float grad_factor, beta1, beta2, eps;
    float grad_weight, square_weight;             // 1 - beta
    float coupled_decay, decoupled_decay;         // weight decay of the gradient and of the direction
    float inv_correction1, inv_sqrt_correction2;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float minus_step;                             // -lr * trust
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    const double beta1 = option[0], beta2 = option[1], weight_decay = option[3];
    const bool corrected = option[4] != 0, decoupled = option[5] != 0;
    Hyper h{};
    h.grad_factor = to_float(x.grad_factor);
    h.beta1 = to_float(beta1);
    h.beta2 = to_float(beta2);
    h.eps = to_float(option[2]);
    h.grad_weight = to_float(1 - beta1);
    h.square_weight = to_float(1 - beta2);
    h.coupled_decay = to_float(decoupled ? 0 : weight_decay);
    h.decoupled_decay = to_float(decoupled ? weight_decay : 0);
    h.inv_correction1 = to_float(corrected ? 1 / (1 - power(beta1, x.step)) : 1);
    h.inv_sqrt_correction2 = to_float(corrected ? 1 / std::sqrt(1 - power(beta2, x.step)) : 1);
    h.minus_step = to_float(-x.lr * x.trust);
    return h;
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    g = fused_multiply_add(F(h.coupled_decay), p, F(h.grad_factor) * g);
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight) * g);
    s[1] = fused_multiply_add(F(h.beta2), s[1], F(h.square_weight) * g * g);
    const F denominator = fused_multiply_add(square_root(s[1]), F(h.inv_sqrt_correction2), F(h.eps));
    return fused_multiply_add(F(h.decoupled_decay), p, divide_by_positive(s[0] * F(h.inv_correction1), denominator));
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[1];
  }
};

BNBOPS_NAMESPACE_END
