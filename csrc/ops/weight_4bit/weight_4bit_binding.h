// The operators that quantize, dequantize and look up 4-bit weights, on every device. A device says how it runs a job,
// what it can check beforehand, and what fresh memory needs:
//   struct Device {
//     explicit Device(const Tensor& like);  // makes its device current for as long as it lives
//     static void prepare(Tensor& fresh);
//     static void check_indices(const Tensor& indices, int64_t rows);  // where values can be read
//     void quantize(const QuantizeJob&) const;
//     void dequantize(const Weight4bit&, int64_t numel, void* out, DType) const;
//     void look_up(const LookUpJob&) const;
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/weight_4bit/weight_4bit_view.h"

namespace bnbops {

template <class Device>
struct Weight4bitOperators {
  using OptionalTensor = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor> quantize(const Tensor& A, int64_t blocksize, std::string quant_type,
                                             ScalarType quant_storage) {
    check_quantize_4bit(A, blocksize, quant_type, quant_storage);
    const Device device(A);
    const Tensor values = in_logical_order(A);
    const int64_t bytes = divide_up(A.numel(), 2);
    Tensor codes = torch::stable::new_empty(A, {bytes / storage_size(quant_storage), 1}, quant_storage);
    Tensor absmax = torch::stable::new_empty(A, {divide_up(A.numel(), blocksize)}, ScalarType::Float);
    device.quantize({values.const_data_ptr(), dtype_of(values), nullptr, mutable_data<uint8_t>(codes),
                     mutable_data<float>(absmax), A.numel(), blocksize, format_of("quantize_4bit", quant_type)});
    return {codes, absmax};
  }

  static Tensor dequantize(const Tensor& A, const Tensor& absmax, int64_t blocksize, std::string quant_type,
                           std::vector<int64_t> shape, ScalarType dtype, OptionalTensor nested_absmax,
                           OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize) {
    const Weight4bitArguments weight{
        "dequantize_4bit", "A",           A,           absmax,        shape,           blocksize,
        quant_type,        nested_absmax, nested_code, nested_offset, nested_blocksize};
    check_dequantize_4bit(weight, dtype);
    return dequantized(weight, dtype);
  }

  static void dequantize_out(const Tensor& A, const Tensor& absmax, int64_t blocksize, std::string quant_type,
                             std::vector<int64_t> shape, ScalarType dtype, OptionalTensor nested_absmax,
                             OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize,
                             Tensor out) {
    const Weight4bitArguments weight{
        "dequantize_4bit", "A",           A,           absmax,        shape,           blocksize,
        quant_type,        nested_absmax, nested_code, nested_offset, nested_blocksize};
    check_dequantize_4bit(weight, dtype);
    check_dequantize_4bit_out(weight, dtype, out);
    if (out.is_contiguous()) return dequantize_into(weight, out);
    torch::stable::copy_(out, dequantized(weight, dtype));
  }

  static Tensor embedding(const Tensor& indices, const Tensor& weight, const Tensor& absmax, std::vector<int64_t> shape,
                          int64_t blocksize, std::string quant_type, ScalarType dtype, OptionalTensor nested_absmax,
                          OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize) {
    const Weight4bitArguments table{"embedding_4bit", "weight",   weight,        absmax,      shape,
                                    blocksize,        quant_type, nested_absmax, nested_code, nested_offset,
                                    nested_blocksize};
    check_embedding_4bit(indices, table, dtype);
    const Device device(weight);
    const Tensor in_order = in_logical_order(indices);
    Device::check_indices(in_order, shape[0]);
    std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
    sizes.push_back(shape[1]);
    Tensor out = torch::stable::new_empty(weight, sizes, dtype);
    device.look_up({kernel_view(table), shape[0], shape[1], in_order.const_data_ptr(), indices.numel(),
                    indices.scalar_type() == ScalarType::Long, out.mutable_data_ptr(), dtype_of(out)});
    return out;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_4bit", TORCH_BOX(&quantize));
    m.impl("dequantize_4bit", TORCH_BOX(&dequantize));
    m.impl("dequantize_4bit.out", TORCH_BOX(&dequantize_out));
    m.impl("embedding_4bit", TORCH_BOX(&embedding));
  }

 private:
  static Tensor dequantized(const Weight4bitArguments& weight, ScalarType dtype) {
    Tensor out = torch::stable::new_empty(weight.weight, weight.shape, dtype);
    Device::prepare(out);
    dequantize_into(weight, out);
    return out;
  }

  static void dequantize_into(const Weight4bitArguments& weight, Tensor& out) {
    const Device device(weight.weight);
    device.dequantize(kernel_view(weight), out.numel(), out.mutable_data_ptr(), dtype_of(out));
  }
};

}  // namespace bnbops
