// The products with 4-bit weights, on every device. A device says how it multiplies:
//   struct Device {
//     static Tensor linear(const Tensor& x, const Weight4bitArguments&, const OptionalTensor& bias);
//     static Tensor input_grad(const Tensor& grad, const Weight4bitArguments&);
//     static Tensor grouped_linear(const Tensor& x, const Weight4bitArguments&, const OptionalTensor& bias,
//                                  const Tensor& offsets);
//     static Tensor grouped_input_grad(const Tensor& grad, const Weight4bitArguments&, const Tensor& offsets);
//   };
#pragma once

#include "ops/weight_4bit/weight_4bit.h"

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

// What differs between the products, and their checks in this order.
struct Product4bit {
  Operator op;
  const char* rows;      // what is multiplied
  const char* features;  // its last dimension, a place in the weight's shape
  bool grouped, is_gradient;

  void check(const Tensor& x, const Weight4bitArguments& weight, const OptionalTensor& bias,
             const OptionalTensor& offsets) const {
    weight.check(grouped ? 3 : 2);
    const auto& shape = weight.shape;
    const int64_t out_features = shape[grouped], last = is_gradient ? out_features : shape.back();
    const Argument named = op(x, rows).floats().device_of(weight.weight);
    BNBOPS_CHECK(x.dim() >= 1 && columns_of(x) == last, named, " has shape ", shape_of(x),
                 ", but its last dimension must be ", features, " = ", last, " of a weight of shape ", text_of(shape));
    if (bias) {
      const Argument named_bias = op(*bias, "bias").dtype(x.scalar_type()).device_of(x);
      grouped ? named_bias.shape({shape[0], out_features}) : named_bias.shape({out_features});
    }
    if (!offsets) return;
    BNBOPS_CHECK(x.dim() == 2, named, " must be a matrix [tokens, features], got ", shape_of(x));
    op(*offsets, "offsets").dtype(ScalarType::Int).device_of(weight.weight).contiguous();
    op(*offsets, "offsets").shape({shape[0]}, "one end for each expert");
  }
};

constexpr Product4bit kLinear4bit{{"linear_4bit"}, "x", "in_features", false, false};
constexpr Product4bit kInputGrad4bit{{"linear_4bit_input_grad"}, "grad", "out_features", false, true};
constexpr Product4bit kGroupedLinear4bit{{"grouped_linear_4bit"}, "x", "in_features", true, false};
constexpr Product4bit kGroupedInputGrad4bit{{"grouped_linear_4bit_input_grad"}, "grad", "out_features", true, true};

template <class Device>
struct Linear4bitOperators {
  template <const Product4bit& kProduct>
  static Tensor multiply(Stack& stack) {
    const auto x = stack.take<Tensor>();
    Weight4bitArguments weight(kProduct.op, "weight", stack);
    OptionalTensor bias, offsets;
    if (!kProduct.is_gradient) bias = stack.take<OptionalTensor>();
    if (kProduct.grouped) offsets = stack.take<Tensor>();
    weight.take_shape(stack);
    weight.take_type(stack);
    weight.take_nested(stack);
    kProduct.check(x, weight, bias, offsets);
    if (kProduct.is_gradient) {
      return kProduct.grouped ? Device::grouped_input_grad(x, weight, *offsets) : Device::input_grad(x, weight);
    }
    return kProduct.grouped ? Device::grouped_linear(x, weight, bias, *offsets) : Device::linear(x, weight, bias);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl(kLinear4bit.op.name, &boxed<&multiply<kLinear4bit>>);
    m.impl(kInputGrad4bit.op.name, &boxed<&multiply<kInputGrad4bit>>);
    m.impl(kGroupedLinear4bit.op.name, &boxed<&multiply<kGroupedLinear4bit>>);
    m.impl(kGroupedInputGrad4bit.op.name, &boxed<&multiply<kGroupedInputGrad4bit>>);
  }
};

}  // namespace bnbops
