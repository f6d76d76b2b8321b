// From torch's tensors to the kernels' pointers, on any device.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"

namespace bnbops {

using OptionalTensor = std::optional<Tensor>;

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

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor itself where its memory already is in logical order.
inline Tensor in_logical_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor in_logical_order(const OptionalTensor& tensor) {
  return tensor ? std::optional(in_logical_order(*tensor)) : std::nullopt;
}

// Rows are what all dimensions but the last one count.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}
inline int64_t columns_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// A tensor's sizes with another last one.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = last;
  return sizes;
}

// out = a @ b, all of them matrices, by torch's own product of one dtype or another of its operators.
inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out, const char* op = "aten::mm") {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more
}

// torch's own layer.
inline Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace bnbops
