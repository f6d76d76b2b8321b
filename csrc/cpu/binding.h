// From torch's tensors to the kernels' pointers.
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

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

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The tensor itself where its memory already is in logical order.
inline Tensor in_logical_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> in_logical_order(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(in_logical_order(*tensor)) : std::nullopt;
}

// A tensor's sizes with another last one.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = last;
  return sizes;
}

// out = a @ b, all of them matrices of one dtype, by torch's own product.
inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more
}

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
