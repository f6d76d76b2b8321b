// Every optimizer's update rule, written once, for the host and for devices.
//
// A rule is code for one element that knows nothing of blocks, bytes or devices. It names its states and options
// (operator schemas are made of them), turns the options into per-step scalars once on the host (`prepare`), and
// updates one element in fp32 (`update`, which tells whether the result is fit to be kept). The number type F of an
// update is float or, on a CPU with SIMD, a vector of floats: whatever has the operations of portable.h.
#pragma once

#include <cmath>

#include "portable.h"

BNBOPS_NAMESPACE_BEGIN

struct StateSpec {
  const char* name;
  bool is_signed;  // an 8-bit state takes the signed or the unsigned dynamic map
};

// Adam with decoupled weight decay; Adam itself is weight_decay = 0.
// Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[kStates] = {{"exp_avg", true}, {"exp_avg_sq", false}};
  static constexpr int kOptions = 4;
  static constexpr const char* kOptionNames[kOptions] = {"beta1", "beta2", "eps", "weight_decay"};

  struct Hyper {
    float beta1, beta2, eps;
    float grad_weight;           // (1 - beta1) * grad_factor
    float square_weight;         // (1 - beta2) * grad_factor^2
    float decay;                 // 1 - lr * weight_decay
    float minus_step_size;       // -lr / (1 - beta1^t)
    float inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  };

  // grad_factor: +-1 / grad_scale; it unscales the gradient, and negates it to maximize.
  static Hyper prepare(const double* option, double lr, double step, double grad_factor) {
    const double beta1 = option[0], beta2 = option[1], eps = option[2], weight_decay = option[3];
    Hyper h{};
    h.beta1 = static_cast<float>(beta1);
    h.beta2 = static_cast<float>(beta2);
    h.eps = static_cast<float>(eps);
    h.grad_weight = static_cast<float>((1 - beta1) * grad_factor);
    h.square_weight = static_cast<float>((1 - beta2) * grad_factor * grad_factor);
    h.decay = static_cast<float>(1 - lr * weight_decay);
    h.minus_step_size = static_cast<float>(-lr / (1 - std::pow(beta1, step)));
    h.inv_sqrt_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    return h;
  }

  // An error message for options out of range, or nullptr.
  static const char* invalid(const double* option) {
    if (!(option[0] >= 0 && option[0] < 1)) return "beta1 must be in [0, 1)";
    if (!(option[1] >= 0 && option[1] < 1)) return "beta2 must be in [0, 1)";
    if (!(option[2] >= 0 && std::isfinite(option[2]))) return "eps must be finite and not negative";
    if (!(option[3] >= 0 && std::isfinite(option[3]))) return "weight_decay must be finite and not negative";
    return nullptr;
  }

  template <class F>
  BNBOPS_HD static auto update(F g, F& p, F (&s)[kStates], const Hyper& h) {
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight) * g);
    s[1] = fused_multiply_add(F(h.beta2), s[1], F(h.square_weight) * g * g);
    const F denominator = fused_multiply_add(square_root(s[1]), F(h.inv_sqrt_correction2), F(h.eps));
    const F direction = divide_by_positive(s[0], denominator);  // eps = 0 and no gradient yet: no step, not a NaN
    p = fused_multiply_add(F(h.minus_step_size), direction, p * F(h.decay));
    return is_finite(s[1]);  // tells of a non-finite gradient, and of a square that overflows
  }
};

// An element whose update is no number (its gradient is not finite) keeps its parameter and states; the rest of the
// block goes on.
template <class Rule, class F>
BNBOPS_HD void guarded_update(F g, F& p, F (&s)[Rule::kStates], const typename Rule::Hyper& h) {
  F new_p = p, new_s[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) new_s[k] = s[k];
  const auto valid = Rule::update(g, new_p, new_s, h);
  p = select(valid, new_p, p);
  for (int k = 0; k < Rule::kStates; ++k) s[k] = select(valid, new_s[k], s[k]);
}

// The table of optimizers: a rule listed here gets its operator and its kernels on every backend.
template <class... Rules>
struct RuleList {
  static constexpr int kSize = sizeof...(Rules);
};
using AllRules = RuleList<Adam>;

BNBOPS_NAMESPACE_END
