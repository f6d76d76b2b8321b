// All update rules.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/momentum.h"
#include "rules/rmsprop.h"
#include "rules/signum.h"

BNBOPS_NAMESPACE_BEGIN

// The table of optimizers: a rule listed here gets its operator and its kernels on every backend.
template <class... Rules>
struct RuleList {
  static constexpr int kSize = sizeof...(Rules);
};
using AllRules = RuleList<Adam, Sgd, Momentum, Lion, RmsProp, RmsPropMomentum, Adagrad, Lamb, Lars, AdEmaMix, Signum>;

// Calls visit(rule, index) for each of them; a rule is an empty struct.
template <class Visit, class... Rules>
constexpr void for_each_rule(RuleList<Rules...>, const Visit& visit) {
  int index = 0;
  (visit(Rules{}, index++), ...);
}

BNBOPS_NAMESPACE_END
