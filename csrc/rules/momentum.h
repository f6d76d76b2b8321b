#pragma once

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Gradient descent without memory (torch.optim.SGD, momentum = 0).
struct Sgd : RuleDefaults {
  static constexpr const char* kName = "sgd";
  static constexpr int kStates = 0;
  static constexpr StateSpec kStateSpecs[] = {{nullptr, Role::kSigned}};
  static constexpr OptionSpec kOptions[] = {{"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, minus_step;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(x.grad_factor), to_float(option[0]), to_float(-x.lr)};
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>&, const Hyper& h) {
    return fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& /*s*/, F u) {
    return u;
  }
};

// Gradient descent with momentum. Sutskever et al. 2013, equations 1 and 2; dampening and Nesterov as torch.optim.SGD.
struct Momentum : RuleDefaults {
  static constexpr const char* kName = "momentum";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"momentum_buffer", Role::kSigned}};
  static constexpr OptionSpec kOptions[] = {{"float", "momentum", kAmount},
                                            {"float", "dampening", kNumber},
                                            {"float", "weight_decay", kAmount},
                                            {"bool", "nesterov", kFlag}};

  struct Hyper {
    float grad_factor, weight_decay, trust, minus_step;
    float kept;         // momentum, 0 at the first step
    float grad_weight;  // 1 - dampening, 1 at the first step
    float momentum;
    bool nesterov;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    const bool first = x.step == 1;
    Hyper h{};
    h.grad_factor = to_float(x.grad_factor);
    h.weight_decay = to_float(option[2]);
    h.trust = to_float(x.trust);
    h.minus_step = to_float(-x.lr);
    h.kept = first ? 0.0F : to_float(option[0]);
    h.grad_weight = first ? 1.0F : to_float(1 - option[1]);
    h.momentum = to_float(option[0]);
    h.nesterov = option[3] != 0;
    return h;
  }

  static const char* conflict(const double* option) {
    const bool fine = option[3] == 0 || (option[0] > 0 && option[1] == 0);
    return fine ? nullptr : "nesterov needs a momentum and no dampening";
  }

  template <class F>
  BNBOPS_HD static F along(F g, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.kept), s[0], F(h.grad_weight) * g);
    return h.nesterov ? fused_multiply_add(F(h.momentum), s[0], g) : s[0];
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    return along(fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g), s, h);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& /*s*/, F u) {
    return u;
  }
};

BNBOPS_NAMESPACE_END
