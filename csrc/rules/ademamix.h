#pragma once

#include <algorithm>
#include <cmath>

#include "rules/rule.h"

BNBOPS_NAMESPACE_BEGIN

// Pagliardini, Ablin & Grangier 2024, algorithm 1.
struct AdEmaMix : DecoupledDecay {
  static constexpr const char* kName = "ademamix";
  static constexpr int kStates = 3;
  static constexpr StateSpec kStateSpecs[] = {
      {"exp_avg", Role::kSigned}, {"exp_avg_slow", Role::kSigned}, {"exp_avg_sq", Role::kSquare}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},  {"float", "beta2", kRate},
                                            {"float", "beta3", kRate},  {"float", "alpha", kAmount},
                                            {"float", "eps", kAmount},  {"float", "weight_decay", kAmount},
                                            {"int", "t_alpha", kCount}, {"int", "t_beta3", kCount}};

  struct Hyper {
    float beta1, beta2, beta3, alpha, eps;
    float grad_weight1, grad_weight3;  // (1 - beta) * grad_factor
    float root_square_weight;          // sqrt(1 - beta2) * grad_factor
    float decay, minus_step;           // 1 - lr * weight_decay, -lr
    float inv_correction1;             // 1 / (1 - beta1^t)
    float inv_sqrt_correction2;        // 1 / sqrt(1 - beta2^t)
  };

  // Linear warm-up of alpha over `horizon` steps; 0 means none.
  BNBOPS_HD static double alpha_at(double step, double alpha, double horizon) {
    return horizon > 0 ? std::min(step / horizon, 1.0) * alpha : alpha;
  }

  // beta3 goes from beta1 to its value over `horizon` steps, its half-life growing linearly. The logarithms are the
  // platform's: on another device, beta3 may differ by an ulp of fp32 meanwhile, and nothing else does.
  BNBOPS_HD static double beta3_at(double step, double beta1, double beta3, double horizon) {
    const double done = step / horizon;
    if (!(horizon > 0) || done >= 1 || beta3 == 0) return beta3;
    const double ln3 = std::log(beta3);
    return std::min(std::exp(ln3 / ((1 - done) * ln3 / std::log(beta1) + done)), beta3);
  }

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    const double beta1 = option[0], beta2 = option[1], beta3 = beta3_at(x.step, beta1, option[2], option[7]);
    Hyper h{};
    h.beta1 = to_float(beta1);
    h.beta2 = to_float(beta2);
    h.beta3 = to_float(beta3);
    h.alpha = to_float(alpha_at(x.step, option[3], option[6]));
    h.eps = to_float(option[4]);
    h.grad_weight1 = to_float((1 - beta1) * x.grad_factor);
    h.grad_weight3 = to_float((1 - beta3) * x.grad_factor);
    h.root_square_weight = to_float(std::sqrt(1 - beta2) * x.grad_factor);
    h.decay = to_float(1 - x.lr * option[5]);
    h.minus_step = to_float(-x.lr);
    h.inv_correction1 = to_float(1 / (1 - power(beta1, x.step)));
    h.inv_sqrt_correction2 = to_float(1 / std::sqrt(1 - power(beta2, x.step)));
    return h;
  }

  template <class F>
  BNBOPS_HD static F direction(F g, F /*p*/, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight1) * g);
    s[1] = fused_multiply_add(F(h.beta3), s[1], F(h.grad_weight3) * g);
    const F root_square = F(h.root_square_weight) * g;
    s[2] = fused_multiply_add(F(h.beta2), s[2], root_square * root_square);
    const F mixed = fused_multiply_add(F(h.alpha), s[1], s[0] * F(h.inv_correction1));
    const F denominator = fused_multiply_add(square_root(s[2]), F(h.inv_sqrt_correction2), F(h.eps));
    return divide_by_positive(mixed, denominator);
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s, F /*u*/) {
    return s[2];
  }
};

BNBOPS_NAMESPACE_END
