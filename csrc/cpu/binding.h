// From torch's tensors to the kernels' pointers.
#pragma once

#include "check.h"
#include "cpu/kernels.h"

namespace bnbops::cpu {

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

// The tensor itself where its memory already is in logical order.
inline Tensor in_logical_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace bnbops::cpu
