// The products with 4-bit weights, on every device, which says how it multiplies:
//   struct Device {
//     static Tensor multiply(const Product4bit&);
//   };
#pragma once

#include "ops/weight_4bit/weight_4bit.h"

namespace bnbops {

inline Tensor as_matrix(const Tensor& x) {
  return x.dim() == 2 ? x : torch::stable::reshape(x, {rows_of(x), columns_of(x)});
}

// Calls product(x, the result), unless there are no rows, and returns the result: x's shape, but for the last
// dimension.
template <class Product>
Tensor by_rows(const Tensor& x, int64_t features, const Product& product) {
  Tensor out = torch::stable::new_empty(x, with_last(x, features));
  if (rows_of(x) > 0) product(x, out);
  return out;
}

// x @ W.T + bias, or grad @ W. W is the weight, [out_features, in_features], or one of [experts, out_features,
// in_features] for the rows up to each offset.
struct Product4bit {
  bool is_gradient;
  Tensor x;  // or the gradient
  Weight4bitArguments weight;
  OptionalTensor bias, offsets;

  Product4bit(const Operator& op, Stack& stack, bool grouped, bool gradient)
      : is_gradient(gradient), x(stack.take<Tensor>()), weight(op, "weight", stack) {
    if (!gradient) bias = stack.take<OptionalTensor>();
    if (grouped) offsets = stack.take<Tensor>();
    weight.take_shape(stack);
    weight.take_type(stack);
    weight.take_nested(stack);
  }

  int64_t out_features() const { return weight.shape[weight.shape.size() - 2]; }
  int64_t in_features() const { return weight.shape.back(); }
  int64_t summed() const { return is_gradient ? out_features() : in_features(); }
  int64_t kept() const { return is_gradient ? in_features() : out_features(); }

  void check() const {
    const Operator& op = weight.op;
    weight.check(offsets ? 3 : 2);
    const Argument rows = op(x, is_gradient ? "grad" : "x").floats().device_of(weight.weight);
    BNBOPS_CHECK(x.dim() >= 1 && columns_of(x) == summed(), rows, " has shape ", shape_of(x),
                 ", but its last dimension must be ", is_gradient ? "out_features" : "in_features", " = ", summed(),
                 " of a weight of shape ", text_of(weight.shape));
    if (bias) {
      const Argument named = op(*bias, "bias").dtype(x.scalar_type()).device_of(x);
      offsets ? named.shape({weight.shape[0], out_features()}) : named.shape({out_features()});
    }
    if (!offsets) return;
    BNBOPS_CHECK(x.dim() == 2, rows, " must be a matrix [tokens, features], got ", shape_of(x));
    const Argument ends = op(*offsets, "offsets").dtype(ScalarType::Int).device_of(weight.weight).contiguous();
    ends.shape({weight.shape[0]}, "one end for each expert");
  }
};

template <class Device>
struct Linear4bitOperators {
  static Tensor linear(Stack& stack) { return multiply({{"linear_4bit"}, stack, false, false}); }
  static Tensor input_grad(Stack& stack) { return multiply({{"linear_4bit_input_grad"}, stack, false, true}); }
  static Tensor grouped(Stack& stack) { return multiply({{"grouped_linear_4bit"}, stack, true, false}); }
  static Tensor grouped_grad(Stack& stack) { return multiply({{"grouped_linear_4bit_input_grad"}, stack, true, true}); }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("linear_4bit", &boxed<&linear>);
    m.impl("linear_4bit_input_grad", &boxed<&input_grad>);
    m.impl("grouped_linear_4bit", &boxed<&grouped>);
    m.impl("grouped_linear_4bit_input_grad", &boxed<&grouped_grad>);
  }

 private:
  static Tensor multiply(const Product4bit& product) {
    product.check();
    return Device::multiply(product);
  }
};

}  // namespace bnbops
