// Every optimizer's update rule, written once, for the host and for devices.
//
// A rule is code for one element that knows nothing of blocks, bytes or devices. It names its states and options
// (operator schemas are made of them), turns the options into scalars once a step and parameter (`prepare`), and
// updates one element in fp32. `update` returns its witness: a number that is finite exactly if the result is fit to
// be kept, which it is not where the gradient is not finite. The number type F is float or, on a CPU with SIMD, a
// vector of floats: whatever has the operations of portable.h.
//
// New optimizer: a struct here, its row in AllRules, a class in bnbops/optim, a reference in tests/reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "portable.h"

BNBOPS_NAMESPACE_BEGIN

struct StateSpec {
  const char* name;
  bool is_signed;           // an 8-bit state takes the signed or the unsigned dynamic map
  bool is_divisor = false;  // a positive value never becomes 0, which the next step would divide by
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

// What most rules have in common.
struct RuleDefaults {
  static constexpr bool kTrust = false;          // no ratio of norms scales the step of a parameter
  static constexpr bool kDirectionNorm = false;  // or it is not made from the norm of `direction`
  // What is wrong with options that are in their ranges but do not go together, or nullptr.
  static const char* conflict(const double* /*option*/) { return nullptr; }
};

// Adam with decoupled weight decay; Adam itself is weight_decay = 0.
// Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2.
struct Adam : RuleDefaults {
  static constexpr const char* kName = "adam";
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", true}, {"exp_avg_sq", false, true}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},
                                            {"float", "beta2", kRate},
                                            {"float", "eps", kAmount},
                                            {"float", "weight_decay", kAmount}};

  struct Hyper {
    float beta1, beta2, eps;
    float grad_weight;           // (1 - beta1) * grad_factor
    float root_square_weight;    // sqrt(1 - beta2) * grad_factor: its square may underflow where the product does not
    float decay;                 // 1 - lr * weight_decay
    float minus_step_size;       // -lr / (1 - beta1^t)
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
    h.minus_step_size = to_float(-x.lr / (1 - power(beta1, x.step)));
    h.inv_sqrt_correction2 = to_float(1 / std::sqrt(1 - power(beta2, x.step)));
    return h;
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight) * g);
    const F root_square = F(h.root_square_weight) * g;
    s[1] = fused_multiply_add(F(h.beta2), s[1], root_square * root_square);
    const F denominator = fused_multiply_add(square_root(s[1]), F(h.inv_sqrt_correction2), F(h.eps));
    const F direction = divide_by_positive(s[0], denominator);  // eps = 0 and no gradient yet: no step, not a NaN
    p = fused_multiply_add(F(h.minus_step_size), direction, p * F(h.decay));
    return s[1];  // tells of a non-finite gradient, and of a square that overflows
  }
};

// Gradient descent without memory (torch.optim.SGD, momentum = 0).
struct Sgd : RuleDefaults {
  static constexpr const char* kName = "sgd";
  static constexpr int kStates = 0;
  static constexpr StateSpec kStateSpecs[] = {{nullptr, false}};
  static constexpr OptionSpec kOptions[] = {{"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, minus_lr;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(x.grad_factor), to_float(option[0]), to_float(-x.lr)};
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>&, const Hyper& h) {
    const F direction = fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g);
    p = fused_multiply_add(F(h.minus_lr), direction, p);
    return direction;
  }
};

// Gradient descent with momentum. Sutskever et al. 2013, equations 1 and 2; dampening and Nesterov as torch.optim.SGD.
struct Momentum : RuleDefaults {
  static constexpr const char* kName = "momentum";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"momentum_buffer", true}};
  static constexpr OptionSpec kOptions[] = {{"float", "momentum", kAmount},
                                            {"float", "dampening", kNumber},
                                            {"float", "weight_decay", kAmount},
                                            {"bool", "nesterov", kFlag}};

  struct Hyper {
    float grad_factor, weight_decay, trust, minus_lr;
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
    h.minus_lr = to_float(-x.lr);
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
  BNBOPS_HD static F descend(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.kept), s[0], F(h.grad_weight) * g);
    const F direction = h.nesterov ? fused_multiply_add(F(h.momentum), s[0], g) : s[0];
    p = fused_multiply_add(F(h.minus_lr), direction, p);
    return direction;
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    return descend(fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g), p, s, h);
  }
};

// You, Gitman & Ginsburg 2017, algorithm 1: momentum over gradients scaled by the trust ratio. The learning rate stays
// outside the buffer, as in torch.optim.SGD.
struct Lars : Momentum {
  static constexpr const char* kName = "lars";
  static constexpr bool kTrust = true;

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    return descend(F(h.trust) * fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g), p, s, h);
  }
};

// Chen et al. 2023, algorithm 2.
struct Lion : RuleDefaults {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", true}};
  static constexpr OptionSpec kOptions[] = {
      {"float", "beta1", kRate}, {"float", "beta2", kRate}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float beta1, beta2, minus_lr;
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
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    const F interpolated = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight1) * g);
    p = fused_multiply_add(F(h.minus_lr), sign_of(interpolated), p * F(h.decay));
    s[0] = fused_multiply_add(F(h.beta2), s[0], F(h.grad_weight2) * g);
    return s[0];
  }
};

// Tieleman & Hinton 2012 (lecture 6e); eps outside the root and coupled weight decay as torch.optim.RMSprop.
struct RmsProp : RuleDefaults {
  static constexpr const char* kName = "rmsprop";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"square_avg", true, true}};  // the map that bitsandbytes takes
  static constexpr OptionSpec kOptions[] = {
      {"float", "alpha", kRate}, {"float", "eps", kAmount}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, minus_lr, alpha, square_weight, eps;
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
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    p = fused_multiply_add(F(h.minus_lr), normalized(g, p, s[0], h), p);
    return s[0];
  }
};

// RMSprop whose steps are accumulated with momentum, as torch.optim.RMSprop.
struct RmsPropMomentum : RuleDefaults {
  static constexpr const char* kName = "rmsprop_momentum";
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {RmsProp::kStateSpecs[0], {"momentum_buffer", true}};
  static constexpr OptionSpec kOptions[] = {
      RmsProp::kOptions[0], RmsProp::kOptions[1], RmsProp::kOptions[2], {"float", "momentum", kAmount}};

  struct Hyper {
    RmsProp::Hyper rmsprop;
    float momentum;
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {RmsProp::prepare(option, x), to_float(option[3])};
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    s[1] = fused_multiply_add(F(h.momentum), s[1], RmsProp::normalized(g, p, s[0], h.rmsprop));
    p = fused_multiply_add(F(h.rmsprop.minus_lr), s[1], p);
    return s[0];
  }
};

// Duchi, Hazan & Singer 2011, figure 1 (diagonal); lr_decay as torch.optim.Adagrad.
struct Adagrad : RuleDefaults {
  static constexpr const char* kName = "adagrad";
  static constexpr int kStates = 1;
  static constexpr StateSpec kStateSpecs[] = {{"sum", true, true}};  // the map that bitsandbytes takes
  static constexpr OptionSpec kOptions[] = {
      {"float", "lr_decay", kAmount}, {"float", "eps", kAmount}, {"float", "weight_decay", kAmount}};

  struct Hyper {
    float grad_factor, weight_decay, eps;
    float minus_step_size;  // -lr / (1 + (t - 1) * lr_decay)
  };

  BNBOPS_HD static Hyper prepare(const double* option, const StepScalars& x) {
    return {to_float(x.grad_factor), to_float(option[2]), to_float(option[1]),
            to_float(-x.lr / (1 + (x.step - 1) * option[0]))};
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    g = fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g);
    s[0] = fused_multiply_add(g, g, s[0]);
    p = fused_multiply_add(F(h.minus_step_size), divide_by_positive(g, square_root(s[0]) + F(h.eps)), p);
    return s[0];
  }
};

// You et al. 2020, algorithm 2. The norms behind the trust ratio come from `direction`.
struct Lamb : RuleDefaults {
  static constexpr const char* kName = "lamb";
  static constexpr bool kDirectionNorm = true;
  static constexpr bool kTrust = true;
  static constexpr int kStates = 2;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", true}, {"exp_avg_sq", false, true}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},          {"float", "beta2", kRate},
                                            {"float", "eps", kAmount},          {"float", "weight_decay", kAmount},
                                            {"bool", "bias_correction", kFlag}, {"bool", "adam_w_mode", kFlag}};

  struct Hyper {
    float grad_factor, beta1, beta2, eps;
    float grad_weight, square_weight;             // 1 - beta
    float coupled_decay, decoupled_decay;         // weight decay of the gradient and of the direction
    float inv_correction1, inv_sqrt_correction2;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float minus_step_size;                        // -lr * trust
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
    h.minus_step_size = to_float(-x.lr * x.trust);
    return h;
  }

  // Moves the states on and returns the direction u, whose norm makes the trust ratio.
  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    g = fused_multiply_add(F(h.coupled_decay), p, F(h.grad_factor) * g);
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight) * g);
    s[1] = fused_multiply_add(F(h.beta2), s[1], F(h.square_weight) * g * g);
    const F denominator = fused_multiply_add(square_root(s[1]), F(h.inv_sqrt_correction2), F(h.eps));
    return fused_multiply_add(F(h.decoupled_decay), p, divide_by_positive(s[0] * F(h.inv_correction1), denominator));
  }

  template <class F>
  BNBOPS_HD static F witness(const States<F, kStates>& s) {
    return s[1];
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    const F u = direction(g, p, s, h);
    p = fused_multiply_add(F(h.minus_step_size), u, p);
    return witness(s);
  }
};

// Pagliardini, Ablin & Grangier 2024, algorithm 1.
struct AdEmaMix : RuleDefaults {
  static constexpr const char* kName = "ademamix";
  static constexpr int kStates = 3;
  static constexpr StateSpec kStateSpecs[] = {{"exp_avg", true}, {"exp_avg_slow", true}, {"exp_avg_sq", false, true}};
  static constexpr OptionSpec kOptions[] = {{"float", "beta1", kRate},  {"float", "beta2", kRate},
                                            {"float", "beta3", kRate},  {"float", "alpha", kAmount},
                                            {"float", "eps", kAmount},  {"float", "weight_decay", kAmount},
                                            {"int", "t_alpha", kCount}, {"int", "t_beta3", kCount}};

  struct Hyper {
    float beta1, beta2, beta3, alpha, eps;
    float grad_weight1, grad_weight3;  // (1 - beta) * grad_factor
    float root_square_weight;          // sqrt(1 - beta2) * grad_factor
    float decay, minus_lr;             // 1 - lr * weight_decay, -lr
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
    h.minus_lr = to_float(-x.lr);
    h.inv_correction1 = to_float(1 / (1 - power(beta1, x.step)));
    h.inv_sqrt_correction2 = to_float(1 / std::sqrt(1 - power(beta2, x.step)));
    return h;
  }

  template <class F>
  BNBOPS_HD static F update(F g, F& p, States<F, kStates>& s, const Hyper& h) {
    s[0] = fused_multiply_add(F(h.beta1), s[0], F(h.grad_weight1) * g);
    s[1] = fused_multiply_add(F(h.beta3), s[1], F(h.grad_weight3) * g);
    const F root_square = F(h.root_square_weight) * g;
    s[2] = fused_multiply_add(F(h.beta2), s[2], root_square * root_square);
    const F mixed = fused_multiply_add(F(h.alpha), s[1], s[0] * F(h.inv_correction1));
    const F denominator = fused_multiply_add(square_root(s[2]), F(h.inv_sqrt_correction2), F(h.eps));
    p = fused_multiply_add(F(h.minus_lr), divide_by_positive(mixed, denominator), p * F(h.decay));
    return s[2];
  }
};

// Updates an element whose witness is finite; any other keeps its parameter and states, and the rest of its block goes
// on.
template <class Rule, class F>
BNBOPS_HD void guarded_update(F g, F& p, StatesOf<F, Rule>& s, const typename Rule::Hyper& h) {
  F new_p = p;
  StatesOf<F, Rule> new_s = s;
  const auto valid = is_finite(Rule::update(g, new_p, new_s, h));
  p = select(valid, new_p, p);
  for (int k = 0; k < Rule::kStates; ++k) s[k] = select(valid, new_s[k], s[k]);
}

// The table of optimizers: a rule listed here gets its operator and its kernels on every backend.
template <class... Rules>
struct RuleList {
  static constexpr int kSize = sizeof...(Rules);
};
using AllRules = RuleList<Adam, Sgd, Momentum, Lion, RmsProp, RmsPropMomentum, Adagrad, Lamb, Lars, AdEmaMix>;

// Calls visit(rule, index) for each of them; a rule is an empty struct.
template <class Visit, class... Rules>
constexpr void for_each_rule(RuleList<Rules...>, const Visit& visit) {
  int index = 0;
  (visit(Rules{}, index++), ...);
}

BNBOPS_NAMESPACE_END
