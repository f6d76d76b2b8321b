// The products with 4-bit weights, on every device. A device says how it multiplies:
//   struct Device {
//     static Tensor linear(const Tensor& x, const Weight4bitArguments&, const OptionalTensor& bias);
//     static Tensor input_grad(const Tensor& grad, const Weight4bitArguments&);
//     static Tensor grouped_linear(const Tensor& x, const Weight4bitArguments&, const OptionalTensor& bias,
//                                  const Tensor& offsets);
//     static Tensor grouped_input_grad(const Tensor& grad, const Weight4bitArguments&, const Tensor& offsets);
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include "core/tensors.h"
#include "ops/weight_4bit/weight_4bit_view.h"

namespace bnbops {

inline Tensor as_matrix(const Tensor& x) { return torch::stable::reshape(x, {rows_of(x), columns_of(x)}); }

// Calls product(rows of x, rows of the result), and returns the result: x's shape, but for the last dimension.
template <class Product>
Tensor by_rows(const Tensor& x, int64_t features, const Product& product) {
  const Tensor out = torch::stable::new_empty(x, with_last(x, features));
  if (rows_of(x) == 0) return out;
  Tensor out_rows = torch::stable::view(out, {rows_of(x), features});
  product(as_matrix(x), out_rows);
  return out;
}

template <class Device>
struct Linear4bitOperators {
  static Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& absmax, OptionalTensor bias,
                       std::vector<int64_t> shape, int64_t blocksize, std::string quant_type,
                       OptionalTensor nested_absmax, OptionalTensor nested_code, OptionalTensor nested_offset,
                       int64_t nested_blocksize) {
    const Weight4bitArguments arguments{"linear_4bit", "weight",      weight,          absmax,
                                        shape,         blocksize,     quant_type,      nested_absmax,
                                        nested_code,   nested_offset, nested_blocksize};
    check_linear_4bit(x, arguments, bias);
    return Device::linear(x, arguments, bias);
  }

  static Tensor input_grad(const Tensor& grad, const Tensor& weight, const Tensor& absmax, std::vector<int64_t> shape,
                           int64_t blocksize, std::string quant_type, OptionalTensor nested_absmax,
                           OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize) {
    const Weight4bitArguments arguments{"linear_4bit_input_grad",
                                        "weight",
                                        weight,
                                        absmax,
                                        shape,
                                        blocksize,
                                        quant_type,
                                        nested_absmax,
                                        nested_code,
                                        nested_offset,
                                        nested_blocksize};
    check_linear_4bit_input_grad(grad, arguments);
    return Device::input_grad(grad, arguments);
  }

  static Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& absmax, OptionalTensor bias,
                               const Tensor& offsets, std::vector<int64_t> shape, int64_t blocksize,
                               std::string quant_type, OptionalTensor nested_absmax, OptionalTensor nested_code,
                               OptionalTensor nested_offset, int64_t nested_blocksize) {
    const Weight4bitArguments arguments{
        "grouped_linear_4bit", "weight",    weight,        absmax,          shape, blocksize, quant_type,
        nested_absmax,         nested_code, nested_offset, nested_blocksize};
    check_grouped_linear_4bit(x, arguments, bias, offsets);
    return Device::grouped_linear(x, arguments, bias, offsets);
  }

  static Tensor grouped_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& absmax,
                                   const Tensor& offsets, std::vector<int64_t> shape, int64_t blocksize,
                                   std::string quant_type, OptionalTensor nested_absmax, OptionalTensor nested_code,
                                   OptionalTensor nested_offset, int64_t nested_blocksize) {
    const Weight4bitArguments arguments{"grouped_linear_4bit_input_grad",
                                        "weight",
                                        weight,
                                        absmax,
                                        shape,
                                        blocksize,
                                        quant_type,
                                        nested_absmax,
                                        nested_code,
                                        nested_offset,
                                        nested_blocksize};
    check_grouped_linear_4bit_input_grad(grad, arguments, offsets);
    return Device::grouped_input_grad(grad, arguments, offsets);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("linear_4bit", TORCH_BOX(&linear));
    m.impl("linear_4bit_input_grad", TORCH_BOX(&input_grad));
    m.impl("grouped_linear_4bit", TORCH_BOX(&grouped_linear));
    m.impl("grouped_linear_4bit_input_grad", TORCH_BOX(&grouped_input_grad));
  }
};

}  // namespace bnbops
