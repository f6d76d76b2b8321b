// The (de)quantization operators of every device. A device says how it runs a job, and what it can check beforehand:
//   struct Device : OnCpu {  // or cuda::OnDevice
//     static void check_sorted(const Tensor& code);           // where values can be read
//     void quantize(const QuantizeJob&) const;
//     void dequantize(const DequantizeJob&) const;
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "codecs/codec.h"
#include "core/layout.h"
#include "core/tensors.h"
#include "ops/jobs.h"

namespace bnbops {

template <class Device>
struct BlockwiseOperators {
  static std::tuple<Tensor, Tensor> quantize(const Tensor& A, const Tensor& code, int64_t blocksize) {
    constexpr Operator op{"quantize_blockwise"};
    op(A, "A").floats();
    check_blocks(op, A, code, blocksize);
    Device::check_sorted(code);
    const Device device(A);
    const Tensor values = in_logical_order(A);
    Tensor codes = Device::new_result(A, A.sizes(), ScalarType::Byte);
    Tensor absmax = torch::stable::new_empty(A, {divide_up(A.numel(), blocksize)}, ScalarType::Float);
    device.quantize({values.const_data_ptr(), dtype_of(values), data_of<float>(code), mutable_data<uint8_t>(codes),
                     mutable_data<float>(absmax), A.numel(), blocksize});
    return {codes, absmax};
  }

  static Tensor dequantize(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                           ScalarType dtype) {
    check_codes(A, absmax, code, blocksize, dtype);
    Tensor out = Device::new_result(A, A.sizes(), dtype);
    dequantize_into(A, absmax, code, blocksize, out);
    return out;
  }

  static void dequantize_out(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                             ScalarType dtype, Tensor out) {
    check_codes(A, absmax, code, blocksize, dtype);
    check_out(kDequantize(out, "out"), dtype, A, A.sizes(), [&] { return ", but A has " + shape_of(A); },
              {kDequantize(A, "A"), kDequantize(absmax, "absmax"), kDequantize(code, "code")});
    if (out.is_contiguous()) return dequantize_into(A, absmax, code, blocksize, out);
    torch::stable::copy_(out, dequantize(A, absmax, code, blocksize, dtype));
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_blockwise", TORCH_BOX(&quantize));
    m.impl("dequantize_blockwise", TORCH_BOX(&dequantize));
    m.impl("dequantize_blockwise.out", TORCH_BOX(&dequantize_out));
  }

 private:
  static constexpr Operator kDequantize{"dequantize_blockwise"};

  static void check_blocks(const Operator& op, const Tensor& A, const Tensor& code, int64_t blocksize) {
    op(code, "code").dtype(ScalarType::Float).device_of(A).contiguous().shape({kCodebookSize});
    BNBOPS_CHECK(blocksize > 0, op, "blocksize must be positive, got ", blocksize);
  }

  static void check_codes(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                          ScalarType dtype) {
    kDequantize(A, "A").dtype(ScalarType::Byte);
    check_blocks(kDequantize, A, code, blocksize);
    const Argument scales = kDequantize(absmax, "absmax").dtype(ScalarType::Float).device_of(A);
    const int64_t blocks = divide_up(A.numel(), blocksize);
    BNBOPS_CHECK(absmax.numel() == blocks, scales, " has ", absmax.numel(), " elements, but ", A.numel(),
                 " codes in blocks of ", blocksize, " need ", blocks);
    kDequantize.check_result_dtype(dtype);
  }

  static void dequantize_into(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                              Tensor& out) {
    const Device device(A);
    const Tensor codes = in_logical_order(A), scales = in_logical_order(absmax);
    device.dequantize({data_of<uint8_t>(codes), data_of<float>(scales), data_of<float>(code), out.mutable_data_ptr(),
                       dtype_of(out), A.numel(), blocksize});
  }
};

}  // namespace bnbops
