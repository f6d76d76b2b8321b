#include "ops/weight_4bit/weight_4bit.h"

#include "formats/all.h"

namespace bnbops {

Weight4bitArguments::Weight4bitArguments(const Operator& of, const char* codes, Stack& stack)
    : op(of), name(codes), weight(stack.take<Tensor>()), absmax(stack.take<Tensor>()) {}

void Weight4bitArguments::take_type(Stack& stack) {
  blocksize = stack.take<int64_t>();
  quant_type = stack.take<std::string>();
}

void Weight4bitArguments::take_nested(Stack& stack) {
  for (OptionalTensor* nested : {&nested_absmax, &nested_code, &nested_offset}) *nested = stack.take<OptionalTensor>();
  nested_blocksize = stack.take<int64_t>();
}

std::vector<Argument> Weight4bitArguments::tensors() const {
  std::vector<Argument> given{op(weight, name), op(absmax, "absmax")};
  if (nested_absmax) given.push_back(op(*nested_absmax, "nested_absmax"));
  if (nested_code) given.push_back(op(*nested_code, "nested_code"));
  if (nested_offset) given.push_back(op(*nested_offset, "nested_offset"));
  return given;
}

int64_t Weight4bitArguments::numel() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

void Weight4bitArguments::check(size_t dims) const {
  check_type_4bit(op, blocksize, quant_type);
  BNBOPS_CHECK(dims == 0 || shape.size() == dims, op, "shape must have ", dims, " dimensions, got ", text_of(shape));
  for (const int64_t size : shape) {
    BNBOPS_CHECK(size >= 0, op, "shape must not have negative sizes, got ", text_of(shape));
  }
  const Argument codes = op(weight, name), scales = op(absmax, "absmax");
  BNBOPS_CHECK(storage_size(weight.scalar_type()) > 0, codes, " must be ", kStorageDtypes, ", got ",
               dtype_name(weight.scalar_type()));
  codes.contiguous();
  const int64_t bytes = weight.numel() * static_cast<int64_t>(weight.element_size()), needed = divide_up(numel(), 2);
  BNBOPS_CHECK(bytes == needed, codes, " has ", bytes, " bytes, but shape ", text_of(shape), " needs ", needed);

  const int64_t blocks = divide_up(numel(), blocksize);
  scales.device_of(weight).contiguous();
  const bool nested = nested_absmax || nested_code || nested_offset;
  BNBOPS_CHECK(!nested || (nested_absmax && nested_code && nested_offset), op,
               "nested_absmax, nested_code and nested_offset go together: give all of them or none");
  nested ? scales.dtype(ScalarType::Byte) : scales.scales();
  BNBOPS_CHECK(absmax.numel() == blocks, scales, " has ", absmax.numel(), " elements, but shape ", text_of(shape),
               " in blocks of ", blocksize, " needs ", blocks);
  if (!nested) return;
  BNBOPS_CHECK(nested_blocksize > 0, op, "nested_blocksize must be positive, got ", nested_blocksize);
  const Argument outer = op(*nested_absmax, "nested_absmax");
  op(*nested_code, "nested_code").scales().device_of(weight).contiguous().shape({kCodebookSize});
  outer.scales().device_of(weight).contiguous();
  op(*nested_offset, "nested_offset").scales().device_of(weight).contiguous().one_element();
  const int64_t nested_blocks = divide_up(blocks, nested_blocksize);
  BNBOPS_CHECK(nested_absmax->numel() == nested_blocks, outer, " has ", nested_absmax->numel(), " elements, but ",
               blocks, " scales in blocks of ", nested_blocksize, " need ", nested_blocks);
}

Weight4bit kernel_view(const Weight4bitArguments& a) {
  Weight4bit weight{data_of<uint8_t>(a.weight), {}, a.blocksize, format_of(a.op, a.quant_type)};
  if (a.nested_absmax) {
    weight.scales = {nullptr,
                     data_of<uint8_t>(a.absmax),
                     data_of<float>(*a.nested_code),
                     data_of<float>(*a.nested_absmax),
                     data_of<float>(*a.nested_offset),
                     a.nested_blocksize};
  } else {
    weight.scales.absmax = data_of<float>(a.absmax);
  }
  return weight;
}

int format_of(const Operator& op, const std::string& name) {
  std::string known;
  for (const Format4bit& format : kFormats4bit) {
    if (name == format.name) return static_cast<int>(&format - kFormats4bit.data());
    known += (known.empty() ? "'" : " or '") + std::string(format.name) + "'";
  }
  fail(op, "quant_type must be ", known, ", got '", name, "'");
}

void check_type_4bit(const Operator& op, int64_t blocksize, const std::string& quant_type) {
  const int64_t smallest = kFormats4bit[format_of(op, quant_type)].smallest_block;
  const bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
  BNBOPS_CHECK(power_of_two && blocksize >= smallest && blocksize <= kLargestBlock4bit, op,
               "blocksize must be a power of two from ", smallest, " to ", kLargestBlock4bit, ", got ", blocksize);
}

int64_t storage_size(ScalarType dtype) {
  if (dtype == ScalarType::Byte || dtype == ScalarType::Char) return 1;
  return dtype == ScalarType::Float ? 4 : is_float(dtype) ? 2 : 0;
}

}  // namespace bnbops
