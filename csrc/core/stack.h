// Operators that take their arguments off the dispatcher's stack themselves, since many of them have the same ones.
#pragma once

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "core/tensors.h"

namespace bnbops {

// The arguments of a call, one by one in the order of the schema.
class Stack {
 public:
  explicit Stack(StableIValue* values) : next_(values) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// For a library's impl(): kOperator(stack) gives a tensor or nothing.
template <auto kOperator>
void boxed(StableIValue* values, uint64_t /*num_args*/, uint64_t /*num_outputs*/) {
  Stack stack(values);
  if constexpr (std::is_void_v<decltype(kOperator(stack))>) {
    kOperator(stack);
  } else {
    values[0] = torch::stable::detail::from(kOperator(stack));
  }
}

}  // namespace bnbops
