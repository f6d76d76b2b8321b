#include "core/check.h"

#include <algorithm>

namespace bnbops {

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Short: return "int16";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

std::string text_of(Sizes sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

bool same_sizes(Sizes a, Sizes b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

const Argument& Argument::dtype(ScalarType expected) const {
  const ScalarType dtype = tensor.scalar_type();
  BNBOPS_CHECK(dtype == expected, *this, " must be ", dtype_name(expected), ", got ", dtype_name(dtype));
  return *this;
}

const Argument& Argument::floats() const {
  const ScalarType dtype = tensor.scalar_type();
  BNBOPS_CHECK(is_float(dtype), *this, " must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  return *this;
}

const Argument& Argument::scales() const {
  const ScalarType dtype = tensor.scalar_type();
  BNBOPS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Int, *this,
               " must be float32, or int32 for the bits of float32, got ", dtype_name(dtype));
  return *this;
}

const Argument& Argument::device_of(const Tensor& other) const {
  if (tensor.is_cpu() && other.is_cpu()) return *this;  // the common case, without making two device objects
  BNBOPS_CHECK(tensor.device() == other.device(), *this, " is on another device than the first tensor");
  return *this;
}

const Argument& Argument::readable_beside(const Tensor& like) const {
  return tensor.is_cpu() ? *this : device_of(like);
}

const Argument& Argument::contiguous() const {
  BNBOPS_CHECK(tensor.is_contiguous(), *this, " must be contiguous; call .contiguous() first");
  return *this;
}

const Argument& Argument::not_expanded() const {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    BNBOPS_CHECK(tensor.size(d) < 2 || tensor.stride(d) != 0, *this,
                 " is expanded; its elements need memory of their own");
  }
  return *this;
}

const Argument& Argument::one_element() const {
  BNBOPS_CHECK(tensor.numel() == 1, *this, " must have one element, got shape ", shape_of(tensor));
  return *this;
}

const Argument& Argument::shape(std::initializer_list<int64_t> sizes, const char* meaning) const {
  BNBOPS_CHECK(same_sizes(tensor.sizes(), sizes), *this, " must have shape ", text_of(sizes), meaning ? ", " : "",
               meaning ? meaning : "", ", got ", shape_of(tensor));
  return *this;
}

std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  out << "bnbops::" << argument.op << ": " << argument.name;
  if (argument.index >= 0) out << '[' << argument.index << ']';
  return out;
}

std::ostream& operator<<(std::ostream& out, const Operator& op) { return out << "bnbops::" << op.name << ": "; }

void Operator::check_result_dtype(ScalarType dtype) const {
  BNBOPS_CHECK(is_float(dtype), *this, "dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

void Overlaps::add(const Argument& argument, bool written) {
  const Tensor& t = argument.tensor;
  if (t.numel() == 0) return;
  int64_t last = t.numel() - 1;  // offset of the last element; strides are not negative
  if (!t.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  }
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  ranges_.push_back(
      {begin, begin + (last + 1) * t.element_size(), written, argument.op, argument.name, argument.index});
}

void Overlaps::check() {
  const auto by_begin = [](const Range& a, const Range& b) { return a.begin < b.begin; };
  std::sort(ranges_.begin(), ranges_.end(), by_begin);
  const Range *reaching = nullptr, *writing = nullptr;  // what reaches furthest so far, of all and of the written
  for (const Range& range : ranges_) {
    const Range* other = range.written ? reaching : writing;
    if (other != nullptr && range.begin < other->end) {
      const auto name = [](const Range& r) {
        return r.index < 0 ? std::string(r.argument) : r.argument + ("[" + std::to_string(r.index) + "]");
      };
      fail("bnbops::", range.op, ": ", name(*other), " and ", name(range),
           " share memory, but one of them is written; pass distinct tensors");
    }
    if (reaching == nullptr || range.end > reaching->end) reaching = &range;
    if (range.written && (writing == nullptr || range.end > writing->end)) writing = &range;
  }
}

}  // namespace bnbops
