// What only tensors in the host's memory allow: reading their values.
#pragma once

#include "tensors.h"

#include <cmath>

#include "cpu/kernels.h"

namespace bnbops::cpu {

// The number in a one-element tensor of float32 or float64.
inline double scalar(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : *static_cast<const float*>(data);
}

// `op` begins the message: "bnbops::adam_step_: ".
inline void check_grad_scale(const std::string& op, const Tensor& grad_scale) {
  const double scale = scalar(grad_scale);
  BNBOPS_CHECK(std::isfinite(scale) && scale > 0, op, "grad_scale must be positive and finite, got ", scale);
}

inline void check_step_values(const std::string& op, const std::vector<Tensor>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const double step = scalar(steps[i]);
    BNBOPS_CHECK(std::isfinite(step) && step >= 0, op, "steps[", i, "] must be finite and not negative, got ", step);
  }
}

}  // namespace bnbops::cpu
