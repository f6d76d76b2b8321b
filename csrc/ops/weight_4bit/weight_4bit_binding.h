// The operators that quantize, dequantize and look up 4-bit weights, on every device. A device says how it runs a job,
// and what it can check beforehand:
//   struct Device : OnCpu {  // or cuda::OnDevice
//     static void check_indices(const Tensor& indices, int64_t rows);  // where values can be read
//     void quantize(const QuantizeJob&) const;
//     void dequantize(const Weight4bit&, int64_t numel, void* out, DType) const;
//     void look_up(const LookUpJob&) const;
//   };
#pragma once

#include <tuple>

#include "ops/weight_4bit/weight_4bit.h"

namespace bnbops {

template <class Device>
struct Weight4bitOperators {
  static std::tuple<Tensor, Tensor> quantize(const Tensor& A, int64_t blocksize, const std::string& quant_type,
                                             ScalarType quant_storage) {
    constexpr Operator op{"quantize_4bit"};
    op(A, "A").floats();
    check_type_4bit(op, blocksize, quant_type);
    const int64_t bytes = divide_up(A.numel(), 2), size = storage_size(quant_storage);
    BNBOPS_CHECK(size > 0, op, "quant_storage must be ", kStorageDtypes, ", got ", dtype_name(quant_storage));
    BNBOPS_CHECK(bytes % size == 0, op, "A has ", A.numel(), " elements, ", bytes,
                 " bytes when packed, which is not a whole number of ", dtype_name(quant_storage), " (", size,
                 " bytes each); use quant_storage uint8");
    const Device device(A);
    const Tensor values = in_logical_order(A);
    Tensor codes = torch::stable::new_empty(A, {bytes / size, 1}, quant_storage);
    Tensor absmax = torch::stable::new_empty(A, {divide_up(A.numel(), blocksize)}, ScalarType::Float);
    device.quantize({values.const_data_ptr(), dtype_of(values), nullptr, mutable_data<uint8_t>(codes),
                     mutable_data<float>(absmax), A.numel(), blocksize, format_of(op, quant_type)});
    return {codes, absmax};
  }

  static Tensor dequantize(Stack& stack) {
    ScalarType dtype{};
    const Weight4bitArguments a = taken(stack, dtype);
    check(a, dtype);
    return dequantized(a, dtype);
  }

  static void dequantize_out(Stack& stack) {
    ScalarType dtype{};
    const Weight4bitArguments a = taken(stack, dtype);
    Tensor out = stack.take<Tensor>();
    check(a, dtype);
    check_out(
        a.op(out, "out"), dtype, a.weight, a.shape, [&] { return ", but shape is " + text_of(a.shape); }, a.tensors());
    if (out.is_contiguous()) return dequantize_into(a, out);
    torch::stable::copy_(out, dequantized(a, dtype));
  }

  static Tensor embedding(Stack& stack) {
    const auto indices = stack.take<Tensor>();
    Weight4bitArguments table({"embedding_4bit"}, "weight", stack);
    table.take_shape(stack);
    table.take_type(stack);
    const auto dtype = stack.take<ScalarType>();
    table.take_nested(stack);
    table.check(2);
    table.op.check_result_dtype(dtype);
    const Argument named = table.op(indices, "indices");
    const ScalarType found = indices.scalar_type();
    BNBOPS_CHECK(found == ScalarType::Int || found == ScalarType::Long, named, " must be int32 or int64, got ",
                 dtype_name(found));
    named.device_of(table.weight);
    const Device device(table.weight);
    const Tensor in_order = in_logical_order(indices);
    const int64_t rows = table.shape[0], width = table.shape[1];
    Device::check_indices(in_order, rows);
    std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
    sizes.push_back(width);
    Tensor out = torch::stable::new_empty(table.weight, sizes, dtype);
    device.look_up({kernel_view(table), rows, width, in_order.const_data_ptr(), indices.numel(),
                    found == ScalarType::Long, out.mutable_data_ptr(), dtype_of(out)});
    return out;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_4bit", TORCH_BOX(&quantize));
    m.impl("dequantize_4bit", &boxed<&dequantize>);
    m.impl("dequantize_4bit.out", &boxed<&dequantize_out>);
    m.impl("embedding_4bit", &boxed<&embedding>);
  }

 private:
  // The arguments that both dequantize_4bit have.
  static Weight4bitArguments taken(Stack& stack, ScalarType& dtype) {
    Weight4bitArguments a({"dequantize_4bit"}, "A", stack);
    a.take_type(stack);
    a.take_shape(stack);
    dtype = stack.take<ScalarType>();
    a.take_nested(stack);
    return a;
  }

  static void check(const Weight4bitArguments& a, ScalarType dtype) {
    a.check(0);
    a.op.check_result_dtype(dtype);
  }

  static Tensor dequantized(const Weight4bitArguments& weight, ScalarType dtype) {
    Tensor out = Device::new_result(weight.weight, weight.shape, dtype);
    dequantize_into(weight, out);
    return out;
  }

  static void dequantize_into(const Weight4bitArguments& weight, Tensor& out) {
    const Device device(weight.weight);
    device.dequantize(kernel_view(weight), out.numel(), out.mutable_data_ptr(), dtype_of(out));
  }
};

}  // namespace bnbops
