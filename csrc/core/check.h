// Argument checks that every backend shares. They run before any byte is written, so a refused call changes nothing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnbops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define BNBOPS_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::bnbops::fail(__VA_ARGS__); \
  } while (false)

std::string dtype_name(ScalarType dtype);
std::string text_of(Sizes sizes);  // "[2, 3]"
inline std::string shape_of(const Tensor& tensor) { return text_of(tensor.sizes()); }
bool same_sizes(Sizes a, Sizes b);
bool is_float(ScalarType dtype);  // float32, bfloat16 or float16

// A tensor argument, and what to call it in a message: "bnbops::op: grads[3]". Each check returns the argument, for the
// next one.
struct Argument {
  const Tensor& tensor;
  const char* op;
  const char* name;
  int64_t index = -1;  // in a list

  const Argument& dtype(ScalarType expected) const;
  const Argument& floats() const;  // is_float
  const Argument& scales() const;  // float32, or int32: the bits of float32
  const Argument& device_of(const Tensor& other) const;
  const Argument& readable_beside(const Tensor& like) const;  // on the device of `like`, or the CPU
  const Argument& contiguous() const;
  const Argument& not_expanded() const;
  const Argument& one_element() const;
  // `meaning` tells what the sizes are, if that is to be said: "one end for each expert".
  const Argument& shape(std::initializer_list<int64_t> sizes, const char* meaning = nullptr) const;
};
std::ostream& operator<<(std::ostream& out, const Argument& argument);

// An operator: what messages begin with, and its arguments.
struct Operator {
  const char* name;
  Argument operator()(const Tensor& tensor, const char* argument, int64_t index = -1) const {
    return {tensor, name, argument, index};
  }
  void check_result_dtype(ScalarType dtype) const;  // is_float
};
std::ostream& operator<<(std::ostream& out, const Operator& op);

// Memory that a call touches. No written range may overlap any other.
class Overlaps {
 public:
  void reads(const Argument& argument) { add(argument, false); }
  void writes(const Argument& argument) { add(argument, true); }
  void check();

 private:
  struct Range {
    uintptr_t begin, end;
    bool written;
    const char *op, *argument;
    int64_t index;
  };
  void add(const Argument& argument, bool written);
  std::vector<Range> ranges_;
};

// A result that the caller gives: its sizes, which `reason` tells (", but A has [2]"), and memory of its own.
template <class Reason>
void check_out(const Argument& out, ScalarType dtype, const Tensor& first, Sizes sizes, const Reason& reason,
               const std::vector<Argument>& read) {
  out.dtype(dtype).device_of(first);
  BNBOPS_CHECK(same_sizes(out.tensor.sizes(), sizes), out, " has shape ", shape_of(out.tensor), reason());
  out.not_expanded();
  Overlaps overlaps;
  for (const Argument& argument : read) overlaps.reads(argument);
  overlaps.writes(out);
  overlaps.check();
}

}  // namespace bnbops
