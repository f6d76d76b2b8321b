// Checks that the operators on 4-bit weights share, on all backends.
#pragma once

#include <optional>
#include <vector>

#include "core/check.h"
#include "core/layout.h"
#include "ops/jobs.h"

namespace bnbops {

constexpr const char* kNestedSchema =
    "*, Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256";

// The arguments that describe a weight: what quantize_4bit gives, and the scales' own scales if they are quantized.
struct Weight4bitArguments {
  const char* op;
  const char* name;  // of the packed codes
  const Tensor &weight, &absmax;
  const std::vector<int64_t>& shape;
  int64_t blocksize;
  const std::string& quant_type;
  const std::optional<Tensor>&nested_absmax, &nested_code, &nested_offset;
  int64_t nested_blocksize;

  int64_t numel() const;
  void check(size_t dims) const;  // dims: how many the shape must have, 0 for any
};

// Whose name it is: an index of kFormats4bit; throws if it is none's.
int format_of(const char* op, const std::string& name);

// Bytes of an element that holds packed codes.
int64_t storage_size(ScalarType quant_storage);

void check_quantize_4bit(const Tensor& A, int64_t blocksize, const std::string& quant_type, ScalarType quant_storage);
void check_dequantize_4bit(const Weight4bitArguments& weight, ScalarType dtype);
void check_dequantize_4bit_out(const Weight4bitArguments& weight, ScalarType dtype, const Tensor& out);
void check_embedding_4bit(const Tensor& indices, const Weight4bitArguments& weight, ScalarType dtype);

// x [..., in_features], and bias [out_features] or [experts, out_features].
void check_linear_4bit(const Tensor& x, const Weight4bitArguments& weight, const std::optional<Tensor>& bias);
void check_linear_4bit_input_grad(const Tensor& grad, const Weight4bitArguments& weight);
// x or grad [tokens, features], offsets int32 [experts].
void check_grouped_linear_4bit(const Tensor& x, const Weight4bitArguments& weight, const std::optional<Tensor>& bias,
                               const Tensor& offsets);
void check_grouped_linear_4bit_input_grad(const Tensor& grad, const Weight4bitArguments& weight, const Tensor& offsets);

}  // namespace bnbops
