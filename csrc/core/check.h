// Argument checks that every backend shares. They run before any byte is written, so a refused call changes nothing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnbops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// A tensor argument and what to call it in a message: "bnbops::op: grads[3]".
struct Named {
  const Tensor& tensor;
  const char* op;
  const char* argument;
  int64_t index = -1;  // in a list
};
std::ostream& operator<<(std::ostream& out, const Named& named);

std::string dtype_name(ScalarType dtype);
std::string shape_of(const Tensor& tensor);
bool same_shape(const Tensor& a, const Tensor& b);
bool is_float(ScalarType dtype);  // float32, bfloat16 or float16

void check_dtype(const Named& named, ScalarType expected);
void check_float(const Named& named);
void check_scales(const Named& named);  // float32, or int32: the bits of float32
void check_same_device(const Named& named, const Tensor& other);
void check_readable(const Named& named, const Tensor& like);  // on the device of `like`, or the CPU
void check_contiguous(const Named& named);
void check_not_expanded(const Named& named);
void check_one_element(const Named& named);
void check_codebook(const Named& named, const Tensor& like);
void check_codebook_shape(const Named& named);

// Memory that a call touches. No written range may overlap any other.
class Overlaps {
 public:
  void reads(const Named& named) { add(named, false); }
  void writes(const Named& named) { add(named, true); }
  void check();

 private:
  struct Range {
    uintptr_t begin, end;
    bool written;
    const char *op, *argument;
    int64_t index;
  };
  void add(const Named& named, bool written);
  std::vector<Range> ranges_;
};

}  // namespace bnbops
