// CPU binding of the (de)quantization operators.
#include "blockwise.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/binding.h"
#include "cpu/memory.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth a thread

void check_sorted(const Tensor& code) {
  const auto* value = static_cast<const float*>(code.const_data_ptr());
  for (int64_t i = 0; i + 1 < code.numel(); ++i) {
    BNBOPS_CHECK(value[i] <= value[i + 1],
                 "bnbops::quantize_blockwise: code must be sorted in ascending order, but code[", i, "] = ", value[i],
                 " and code[", i + 1, "] = ", value[i + 1]);
  }
}

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& A, const Tensor& code, int64_t blocksize) {
  check_quantize(A, code, blocksize);
  check_sorted(code);
  const Tensor values = in_logical_order(A);
  const int64_t blocks = divide_up(A.numel(), blocksize);
  Tensor codes = torch::stable::new_empty(A, A.sizes(), ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(A, {blocks}, ScalarType::Float);
  prefer_huge_pages(codes);
  const QuantizeJob job{values.const_data_ptr(),
                        dtype_of(values),
                        static_cast<const float*>(code.const_data_ptr()),
                        static_cast<uint8_t*>(codes.mutable_data_ptr()),
                        static_cast<float*>(absmax.mutable_data_ptr()),
                        A.numel(),
                        blocksize};
  const Kernels& kernels = *isa().kernels;
  torch::stable::parallel_for(0, blocks, divide_up(kGrain, blocksize),
                              [&](int64_t first, int64_t last) { kernels.quantize(job, first, last); });
  return {codes, absmax};
}

void dequantize_into(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize, Tensor& out) {
  const Tensor codes = in_logical_order(A), scales = in_logical_order(absmax);
  const DequantizeJob job{static_cast<const uint8_t*>(codes.const_data_ptr()),
                          static_cast<const float*>(scales.const_data_ptr()),
                          static_cast<const float*>(code.const_data_ptr()),
                          out.mutable_data_ptr(),
                          dtype_of(out),
                          A.numel(),
                          blocksize};
  const Kernels& kernels = *isa().kernels;
  torch::stable::parallel_for(0, divide_up(A.numel(), kChunk), kGrain / kChunk,
                              [&](int64_t first, int64_t last) { kernels.dequantize(job, first, last); });
}

Tensor dequantize_blockwise(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                            ScalarType dtype) {
  check_dequantize(A, absmax, code, blocksize, dtype);
  Tensor out = torch::stable::new_empty(A, A.sizes(), dtype);
  prefer_huge_pages(out);
  dequantize_into(A, absmax, code, blocksize, out);
  return out;
}

void dequantize_blockwise_out(const Tensor& A, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                              ScalarType dtype, Tensor out) {
  check_dequantize(A, absmax, code, blocksize, dtype);
  check_dequantize_out(A, absmax, code, dtype, out);
  if (out.is_contiguous()) return dequantize_into(A, absmax, code, blocksize, out);
  torch::stable::copy_(out, dequantize_blockwise(A, absmax, code, blocksize, dtype));
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  m.impl("quantize_blockwise", TORCH_BOX(&bnbops::cpu::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&bnbops::cpu::dequantize_blockwise));
  m.impl("dequantize_blockwise.out", TORCH_BOX(&bnbops::cpu::dequantize_blockwise_out));
}
