#include "core/check.h"

#include <algorithm>

#include "codecs/codec.h"

namespace bnbops {

std::ostream& operator<<(std::ostream& out, const Named& named) {
  out << "bnbops::" << named.op << ": " << named.argument;
  if (named.index >= 0) out << '[' << named.index << ']';
  return out;
}

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

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

void check_dtype(const Named& named, ScalarType expected) {
  const ScalarType dtype = named.tensor.scalar_type();
  BNBOPS_CHECK(dtype == expected, named, " must be ", dtype_name(expected), ", got ", dtype_name(dtype));
}

void check_float(const Named& named) {
  const ScalarType dtype = named.tensor.scalar_type();
  BNBOPS_CHECK(is_float(dtype), named, " must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

void check_scales(const Named& named) {
  const ScalarType dtype = named.tensor.scalar_type();
  BNBOPS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Int, named,
               " must be float32, or int32 for the bits of float32, got ", dtype_name(dtype));
}

void check_same_device(const Named& named, const Tensor& other) {
  if (named.tensor.is_cpu() && other.is_cpu()) return;  // the common case, without making two device objects
  BNBOPS_CHECK(named.tensor.device() == other.device(), named, " is on another device than the first tensor");
}

void check_readable(const Named& named, const Tensor& like) {
  if (!named.tensor.is_cpu()) check_same_device(named, like);
}

void check_contiguous(const Named& named) {
  BNBOPS_CHECK(named.tensor.is_contiguous(), named, " must be contiguous; call .contiguous() first");
}

void check_not_expanded(const Named& named) {
  const Tensor& tensor = named.tensor;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    BNBOPS_CHECK(tensor.size(d) < 2 || tensor.stride(d) != 0, named,
                 " is expanded; its elements need memory of their own");
  }
}

void check_one_element(const Named& named) {
  BNBOPS_CHECK(named.tensor.numel() == 1, named, " must have one element, got shape ", shape_of(named.tensor));
}

void check_codebook(const Named& named, const Tensor& like) {
  check_dtype(named, ScalarType::Float);
  check_same_device(named, like);
  check_contiguous(named);
  check_codebook_shape(named);
}

void check_codebook_shape(const Named& named) {
  BNBOPS_CHECK(named.tensor.dim() == 1 && named.tensor.numel() == kCodebookSize, named, " must have shape [",
               kCodebookSize, "], got ", shape_of(named.tensor));
}

void Overlaps::add(const Named& named, bool written) {
  const Tensor& t = named.tensor;
  if (t.numel() == 0) return;
  int64_t last = t.numel() - 1;  // offset of the last element; strides are not negative
  if (!t.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  }
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  ranges_.push_back({begin, begin + (last + 1) * t.element_size(), written, named.op, named.argument, named.index});
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
