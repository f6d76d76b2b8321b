#pragma once

#include "rules/momentum.h"

BNBOPS_NAMESPACE_BEGIN

// You, Gitman & Ginsburg 2017, algorithm 1: momentum over gradients scaled by the trust ratio. The learning rate stays
// outside the buffer, as in torch.optim.SGD.
struct Lars : Momentum {
  static constexpr const char* kName = "lars";
  static constexpr Trust kTrust = Trust::kGradient;

  template <class F>
  BNBOPS_HD static F direction(F g, F p, States<F, kStates>& s, const Hyper& h) {
    return along(F(h.trust) * fused_multiply_add(F(h.weight_decay), p, F(h.grad_factor) * g), s, h);
  }
};

BNBOPS_NAMESPACE_END
