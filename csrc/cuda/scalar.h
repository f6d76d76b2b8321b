// Numbers that operators get in tensors of one element.
#pragma once

#include "core/portable.h"
#include "cuda/runtime.h"

namespace bnbops::cuda {

// A number that the host knows, or one in the device's memory.
struct Scalar {
  const void* at;  // or null, and the value is here:
  double value;
  bool is_double;
};

BNBOPS_HD double value_of(const Scalar& scalar) {
  if (scalar.at == nullptr) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.at) : *static_cast<const float*>(scalar.at);
}

// What grad_scale, and what steps and factors must be. A kernel leaves alone what the CPU's operators would refuse.
BNBOPS_HD bool is_scale(double x) { return is_finite(x) && x > 0; }
BNBOPS_HD bool is_amount_or_count(double x) { return is_finite(x) && x >= 0; }

}  // namespace bnbops::cuda
