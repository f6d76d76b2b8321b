// The arguments that the operators on 4-bit weights share, on all backends.
#pragma once

#include "core/layout.h"
#include "core/stack.h"
#include "ops/jobs.h"

namespace bnbops {

// What describes a weight: what quantize_4bit gives, and the scales' own scales if they are quantized.
struct Weight4bitArguments {
  Operator op;
  const char* name;  // of the packed codes
  Tensor weight, absmax;
  std::vector<int64_t> shape;
  int64_t blocksize;
  std::string quant_type;
  OptionalTensor nested_absmax, nested_code, nested_offset;
  int64_t nested_blocksize;

  // Takes the weight and absmax; the others have their places further on in a schema.
  Weight4bitArguments(const Operator& of, const char* codes, Stack& stack);
  void take_shape(Stack& stack) { shape = stack.take<std::vector<int64_t>>(); }
  void take_type(Stack& stack);  // blocksize and quant_type
  void take_nested(Stack& stack);

  std::vector<Argument> tensors() const;  // all that are given
  int64_t numel() const;
  void check(size_t dims) const;  // dims: how many the shape must have, 0 for any
};

// The same for kernels, which read the tensors' memory.
Weight4bit kernel_view(const Weight4bitArguments& arguments);

// Whose name it is: an index of kFormats4bit; throws if it is none's.
int format_of(const Operator& op, const std::string& name);

void check_type_4bit(const Operator& op, int64_t blocksize, const std::string& quant_type);

// Of packed codes: the bytes of an element, or 0 if that dtype does not hold them.
int64_t storage_size(ScalarType dtype);
constexpr const char* kStorageDtypes = "uint8, int8, float32, bfloat16 or float16";

}  // namespace bnbops
