#pragma once

#include "rules/momentum.h"

BNBOPS_NAMESPACE_BEGIN

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

BNBOPS_NAMESPACE_END
