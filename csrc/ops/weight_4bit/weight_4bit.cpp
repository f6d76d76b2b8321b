#include "ops/weight_4bit/weight_4bit.h"

#include "formats/all.h"

namespace bnbops {
namespace {

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void check_type(const char* op, int64_t blocksize, const std::string& quant_type) {
  const int64_t smallest = kFormats4bit[format_of(op, quant_type)].smallest_block;
  const bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
  BNBOPS_CHECK(power_of_two && blocksize >= smallest && blocksize <= kLargestBlock4bit, "bnbops::", op,
               ": blocksize must be a power of two from ", smallest, " to ", kLargestBlock4bit, ", got ", blocksize);
}

void check_result_dtype(const char* op, ScalarType dtype) {
  BNBOPS_CHECK(is_float(dtype), "bnbops::", op, ": dtype must be float32, bfloat16 or float16, got ",
               dtype_name(dtype));
}

bool is_storage(ScalarType dtype) { return is_float(dtype) || dtype == ScalarType::Byte || dtype == ScalarType::Char; }

void check_storage(const Named& named) {
  const ScalarType dtype = named.tensor.scalar_type();
  BNBOPS_CHECK(is_storage(dtype), named, " must be uint8, int8, float32, bfloat16 or float16, got ", dtype_name(dtype));
}

void check_nested(const Named& named, const Tensor& weight) {
  check_scales(named);
  check_same_device(named, weight);
  check_contiguous(named);
}

// `last` is the size that the last dimension must have, `which` its place in the weight's shape.
void check_features(const Named& named, const Weight4bitArguments& weight, int64_t last, const char* which) {
  check_float(named);
  check_same_device(named, weight.weight);
  const Tensor& tensor = named.tensor;
  BNBOPS_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == last, named, " has shape ", shape_of(tensor),
               ", but its last dimension must be ", which, " = ", last, " of a weight of shape ",
               text_of(weight.shape));
}

void check_bias(const Weight4bitArguments& weight, const std::optional<Tensor>& bias, const Tensor& x,
                const std::vector<int64_t>& expected) {
  if (!bias) return;
  const Named named{*bias, weight.op, "bias"};
  check_dtype(named, x.scalar_type());
  check_same_device(named, x);
  bool same = bias->dim() == static_cast<int64_t>(expected.size());
  for (int64_t d = 0; same && d < bias->dim(); ++d) same = bias->size(d) == expected[d];
  BNBOPS_CHECK(same, named, " must have shape ", text_of(expected), ", got ", shape_of(*bias));
}

void check_offsets(const Weight4bitArguments& weight, const Tensor& offsets, const Named& rows) {
  BNBOPS_CHECK(rows.tensor.dim() == 2, rows, " must be a matrix [tokens, features], got ", shape_of(rows.tensor));
  const Named named{offsets, weight.op, "offsets"};
  check_dtype(named, ScalarType::Int);
  check_same_device(named, weight.weight);
  check_contiguous(named);
  BNBOPS_CHECK(offsets.dim() == 1 && offsets.size(0) == weight.shape[0], named, " must have shape [", weight.shape[0],
               "], one end for each expert, got ", shape_of(offsets));
}

}  // namespace

int64_t Weight4bitArguments::numel() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

void Weight4bitArguments::check(size_t dims) const {
  check_type(op, blocksize, quant_type);
  BNBOPS_CHECK(dims == 0 || shape.size() == dims, "bnbops::", op, ": shape must have ", dims, " dimensions, got ",
               text_of(shape));
  for (const int64_t size : shape) {
    BNBOPS_CHECK(size >= 0, "bnbops::", op, ": shape must not have negative sizes, got ", text_of(shape));
  }
  const Named codes{weight, op, name};
  check_storage(codes);
  check_contiguous(codes);
  const int64_t bytes = weight.numel() * static_cast<int64_t>(weight.element_size());
  BNBOPS_CHECK(bytes == divide_up(numel(), 2), codes, " has ", bytes, " bytes, but shape ", text_of(shape), " needs ",
               divide_up(numel(), 2));

  const int64_t blocks = divide_up(numel(), blocksize);
  const Named scales{absmax, op, "absmax"};
  check_same_device(scales, weight);
  check_contiguous(scales);
  const bool nested = nested_absmax || nested_code || nested_offset;
  BNBOPS_CHECK(!nested || (nested_absmax && nested_code && nested_offset), "bnbops::", op,
               ": nested_absmax, nested_code and nested_offset go together: give all of them or none");
  if (nested) {
    check_dtype(scales, ScalarType::Byte);
  } else {
    check_scales(scales);
  }
  BNBOPS_CHECK(absmax.numel() == blocks, scales, " has ", absmax.numel(), " elements, but shape ", text_of(shape),
               " in blocks of ", blocksize, " needs ", blocks);
  if (!nested) return;
  BNBOPS_CHECK(nested_blocksize > 0, "bnbops::", op, ": nested_blocksize must be positive, got ", nested_blocksize);
  check_nested({*nested_code, op, "nested_code"}, weight);
  check_codebook_shape({*nested_code, op, "nested_code"});
  check_nested({*nested_absmax, op, "nested_absmax"}, weight);
  check_nested({*nested_offset, op, "nested_offset"}, weight);
  check_one_element({*nested_offset, op, "nested_offset"});
  const int64_t nested_blocks = divide_up(blocks, nested_blocksize);
  BNBOPS_CHECK(nested_absmax->numel() == nested_blocks, Named{*nested_absmax, op, "nested_absmax"}, " has ",
               nested_absmax->numel(), " elements, but ", blocks, " scales in blocks of ", nested_blocksize, " need ",
               nested_blocks);
}

int format_of(const char* op, const std::string& name) {
  std::string known;
  for (const Format4bit& format : kFormats4bit) {
    if (name == format.name) return static_cast<int>(&format - kFormats4bit.data());
    known += (known.empty() ? "'" : " or '") + std::string(format.name) + "'";
  }
  fail("bnbops::", op, ": quant_type must be ", known, ", got '", name, "'");
}

int64_t storage_size(ScalarType quant_storage) {
  return quant_storage == ScalarType::Float ? 4 : is_float(quant_storage) ? 2 : 1;
}

void check_quantize_4bit(const Tensor& A, int64_t blocksize, const std::string& quant_type, ScalarType quant_storage) {
  constexpr const char* kOp = "quantize_4bit";
  check_float({A, kOp, "A"});
  check_type(kOp, blocksize, quant_type);
  BNBOPS_CHECK(is_storage(quant_storage), "bnbops::", kOp,
               ": quant_storage must be uint8, int8, float32, bfloat16 or float16, got ", dtype_name(quant_storage));
  const int64_t bytes = divide_up(A.numel(), 2), size = storage_size(quant_storage);
  BNBOPS_CHECK(bytes % size == 0, "bnbops::", kOp, ": A has ", A.numel(), " elements, ", bytes,
               " bytes when packed, which is not a whole number of ", dtype_name(quant_storage), " (", size,
               " bytes each); use quant_storage uint8");
}

void check_dequantize_4bit(const Weight4bitArguments& weight, ScalarType dtype) {
  weight.check(0);
  check_result_dtype(weight.op, dtype);
}

void check_dequantize_4bit_out(const Weight4bitArguments& weight, ScalarType dtype, const Tensor& out) {
  const Named named{out, weight.op, "out"};
  check_dtype(named, dtype);
  check_same_device(named, weight.weight);
  bool same = out.dim() == static_cast<int64_t>(weight.shape.size());
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == weight.shape[d];
  BNBOPS_CHECK(same, named, " has shape ", shape_of(out), ", but shape is ", text_of(weight.shape));
  check_not_expanded(named);
  Overlaps overlaps;
  overlaps.reads({weight.weight, weight.op, weight.name});
  overlaps.reads({weight.absmax, weight.op, "absmax"});
  if (weight.nested_absmax) {
    overlaps.reads({*weight.nested_absmax, weight.op, "nested_absmax"});
    overlaps.reads({*weight.nested_code, weight.op, "nested_code"});
    overlaps.reads({*weight.nested_offset, weight.op, "nested_offset"});
  }
  overlaps.writes(named);
  overlaps.check();
}

void check_embedding_4bit(const Tensor& indices, const Weight4bitArguments& weight, ScalarType dtype) {
  weight.check(2);
  check_result_dtype(weight.op, dtype);
  const Named named{indices, weight.op, "indices"};
  const ScalarType found = indices.scalar_type();
  BNBOPS_CHECK(found == ScalarType::Int || found == ScalarType::Long, named, " must be int32 or int64, got ",
               dtype_name(found));
  check_same_device(named, weight.weight);
}

void check_linear_4bit(const Tensor& x, const Weight4bitArguments& weight, const std::optional<Tensor>& bias) {
  weight.check(2);
  check_features({x, weight.op, "x"}, weight, weight.shape[1], "in_features");
  check_bias(weight, bias, x, {weight.shape[0]});
}

void check_linear_4bit_input_grad(const Tensor& grad, const Weight4bitArguments& weight) {
  weight.check(2);
  check_features({grad, weight.op, "grad"}, weight, weight.shape[0], "out_features");
}

void check_grouped_linear_4bit(const Tensor& x, const Weight4bitArguments& weight, const std::optional<Tensor>& bias,
                               const Tensor& offsets) {
  weight.check(3);
  const Named named{x, weight.op, "x"};
  check_features(named, weight, weight.shape[2], "in_features");
  check_bias(weight, bias, x, {weight.shape[0], weight.shape[1]});
  check_offsets(weight, offsets, named);
}

void check_grouped_linear_4bit_input_grad(const Tensor& grad, const Weight4bitArguments& weight,
                                          const Tensor& offsets) {
  weight.check(3);
  const Named named{grad, weight.op, "grad"};
  check_features(named, weight, weight.shape[1], "out_features");
  check_offsets(weight, offsets, named);
}

}  // namespace bnbops
