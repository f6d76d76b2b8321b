#pragma once

#include <cmath>

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Adam with decoupled weight decay; Adam itself is weight_decay = 0.
// Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
struct Adam : DecoupledDecay {
  static constexpr const char* kName = "adam";
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", Role::kSigned}, {"exp_avg_sq", Role::kSquare}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},
                                            {"float", "beta2", kRate},
                                            {"float", "eps", kAmount},
                                            {"float", "weight_decay", kAmount}};

  struct Hyper {
    float beta1, beta2, eps;
    float grad_weight;           // (1 - beta1) * grad_factor
    float root_square_weight;    // sqrt(1 - beta2) * grad_factor: its square may underflow where the product does not
    float decay;                 // 1 - lr * weight_decay
    float minus_step;            // -lr / (1 - beta1^t)
    float inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    const double beta1 = option[0], beta2 = option[1], eps = option[2], weight_decay = option[3];
    Hyper h{};
    h.beta1 = to_float(beta1);
    h.beta2 = to_float(beta2);
    h.eps = to_float(eps);
    h.grad_weight = to_float((1 - beta1) * x.grad_factor);
    h.root_square_weight = to_float(std::sqrt(1 - beta2) * x.grad_factor);
    h.decay = to_float(1 - x.lr * weight_decay);
    h.minus_step = to_float(-x.lr / (1 - power(beta1, x.step)));
    h.inv_sqrt_correction2 = to_float(1 / std::sqrt(1 - power(beta2, x.step)));
    return h;
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F /*p*/, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight) * g);
    const F root_square = F(h.root_square_weight) * g;
    s[1] = fused_multiply_add(F(h.beta2), s[1], root_square * root_square);
    const F denominator = fused_multiply_add(square_root(s[1]), F(h.inv_sqrt_correction2), F(h.eps));
    return divide_by_positive(s[0], denominator);  // eps = 0 and no gradient yet: no step, not a NaN
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[1];  // tells of a non-finite gradient, and of a square that overflows
  }
};

BNBOPS_NAMESPACE_END
