// The (de)quantization operators of every device. A device says how it runs a job, what it can check beforehand, and
// what fresh memory needs:
//   struct Device {
//     explicit Device(const Tensor& like);                    // makes its device current for as long as it lives
//     static void check_sorted(const Tensor& code);           // where values can be read
//     static void prepare(Tensor& fresh);
//     void quantize(const QuantizeJob&) const;
//     void dequantize(const DequantizeJob&) const;
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/tensors.h"
#include "ops/blockwise/blockwise.h"
#include "ops/jobs.h"

namespace bnbops {

template <class Device>
struct BlockwiseOperators {
  static std::tuple<Tensor, Tensor> quantize(const Tensor& A, const Tensor& code, int64_t blocksize) {
    check_quantize(A, code, blocksize);
    Device::check_sorted(code);
    const Device device(A);
    const Tensor values = in_logical_order(A);
    Tensor codes = torch::stable::new_empty(A, A.sizes(), ScalarType::Byte);
    Tensor absmax = torch::stable::new_empty(A, {divide_up(A.numel(), blocksize)}, ScalarType::Float);
    Device::prepare(codes);
    device.quantize({values.const_data_ptr(), dtype_of(values), data_of<float>(code), mutable_data<uint8_t>(codes),
                     mutable_data<float>(absmax), A.numel(), blocksize});
    return {codes, absmax};
  }

  static Tensor dequantize(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                           ScalarType dtype) {
    check_dequantize(A, absmax, code, blocksize, dtype);
    Tensor out = torch::stable::new_empty(A, A.sizes(), dtype);
    Device::prepare(out);
    dequantize_into(A, absmax, code, blocksize, out);
    return out;
  }

  static void dequantize_out(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                             ScalarType dtype, Tensor out) {
    check_dequantize(A, absmax, code, blocksize, dtype);
    check_dequantize_out(A, absmax, code, dtype, out);
    if (out.is_contiguous()) return dequantize_into(A, absmax, code, blocksize, out);
    torch::stable::copy_(out, dequantize(A, absmax, code, blocksize, dtype));
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_blockwise", TORCH_BOX(&quantize));
    m.impl("dequantize_blockwise", TORCH_BOX(&dequantize));
    m.impl("dequantize_blockwise.out", TORCH_BOX(&dequantize_out));
  }

 private:
  static void dequantize_into(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                              Tensor& out) {
    const Device device(A);
    const Tensor codes = in_logical_order(A), scales = in_logical_order(absmax);
    device.dequantize({data_of<uint8_t>(codes), data_of<float>(scales), data_of<float>(code), out.mutable_data_ptr(),
                       dtype_of(out), A.numel(), blocksize});
  }
};

}  // namespace bnbops
