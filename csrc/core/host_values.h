// Numbers in tensors that the host can read.
#pragma once

#include <cmath>

#include "core/tensors.h"

namespace bnbops {

// The number in a one-element tensor of float32 or float64.
inline double scalar(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : *static_cast<const float*>(data);
}

template <class Op>
inline void check_lr(const Op& op, const Tensor& lr) {
  BNBOPS_CHECK(std::isfinite(scalar(lr)), op, "lr must be finite, got ", scalar(lr));
}

template <class Op>
inline void check_grad_scale(const Op& op, const Tensor& grad_scale) {
  const double scale = scalar(grad_scale);
  BNBOPS_CHECK(std::isfinite(scale) && scale > 0, op, "grad_scale must be positive and finite, got ", scale);
}

template <class Op>
inline void check_step_values(const Op& op, const std::vector<Tensor>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const double step = scalar(steps[i]);
    BNBOPS_CHECK(std::isfinite(step) && step >= 0, op, "steps[", i, "] must be finite and not negative, got ", step);
  }
}

template <class Op>
inline void check_factors(const Op& op, const std::optional<Tensor>& factors, const char* argument) {
  for (int64_t i = 0; factors && i < factors->numel(); ++i) {
    const float factor = data_of<float>(*factors)[i];
    BNBOPS_CHECK(std::isfinite(factor) && factor >= 0, op, argument, "[", i, "] must be finite and not negative, got ",
                 factor);
  }
}

}  // namespace bnbops
