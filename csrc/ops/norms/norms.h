// Checks of the norm operators.
#pragma once

#include <optional>
#include <vector>

#include "core/check.h"
#include "ops/norms/norm_math.h"

namespace bnbops {

void check_squared_norms(const std::vector<Tensor>& tensors);

void check_percentile_clip(const std::vector<Tensor>& gnorm_vec, const Tensor& squared_norms,
                           const std::vector<Tensor>& steps, int64_t percentile,
                           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf);

}  // namespace bnbops
