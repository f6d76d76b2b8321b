// CPU binding of the operators that quantize, dequantize and look up 4-bit weights.
#include "weight_4bit.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/memory.h"
#include "cpu/weight_4bit_binding.h"

namespace bnbops::cpu {

constexpr int64_t kGrain = 32768;  // elements worth a thread

void dequantize_range(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype) {
  const Kernels& kernels = *isa().kernels;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  constexpr int64_t kLines = 64;  // elements; a multiple of it fills whole lines in every dtype
  const bool past_caches =
      first % kLines == 0 && weight.blocksize % kLines == 0 && worth_past_caches(out, numel * size);
  torch::stable::parallel_for(0, divide_up(numel, kChunk), kGrain / kChunk, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kChunk, to = std::min(numel, end * kChunk);
    kernels.dequantize_4bit(weight, first + from, to - from, static_cast<uint8_t*>(out) + from * size, dtype,
                            past_caches);
  });
}

namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& A, int64_t blocksize, std::string quant_type,
                                         ScalarType quant_storage) {
  check_quantize_4bit(A, blocksize, quant_type, quant_storage);
  const Tensor values = in_logical_order(A);
  const int64_t blocks = divide_up(A.numel(), blocksize), bytes = divide_up(A.numel(), 2);
  Tensor codes = torch::stable::new_empty(A, {bytes / storage_size(quant_storage), 1}, quant_storage);
  Tensor absmax = torch::stable::new_empty(A, {blocks}, ScalarType::Float);
  const QuantizeJob job{values.const_data_ptr(),
                        dtype_of(values),
                        nullptr,
                        static_cast<uint8_t*>(codes.mutable_data_ptr()),
                        static_cast<float*>(absmax.mutable_data_ptr()),
                        A.numel(),
                        blocksize,
                        quant_type_of(quant_type)};
  const Kernels& kernels = *isa().kernels;
  torch::stable::parallel_for(0, blocks, divide_up(kGrain, blocksize),
                              [&](int64_t first, int64_t last) { kernels.quantize_4bit(job, first, last); });
  return {codes, absmax};
}

Tensor dequantized(const Weight4bitArguments& weight, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(weight.weight, weight.shape, dtype);
  prefer_huge_pages(out);
  dequantize_range(kernel_view(weight), 0, out.numel(), out.mutable_data_ptr(), dtype_of(out));
  return out;
}

Tensor dequantize_4bit(const Tensor& A, const Tensor& absmax, int64_t blocksize, std::string quant_type,
                       std::vector<int64_t> shape, ScalarType dtype, OptionalTensor nested_absmax,
                       OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize) {
  const Weight4bitArguments weight{
      "dequantize_4bit", "A",           A,           absmax,        shape,           blocksize,
      quant_type,        nested_absmax, nested_code, nested_offset, nested_blocksize};
  check_dequantize_4bit(weight, dtype);
  return dequantized(weight, dtype);
}

void dequantize_4bit_out(const Tensor& A, const Tensor& absmax, int64_t blocksize, std::string quant_type,
                         std::vector<int64_t> shape, ScalarType dtype, OptionalTensor nested_absmax,
                         OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize,
                         Tensor out) {
  const Weight4bitArguments weight{
      "dequantize_4bit", "A",           A,           absmax,        shape,           blocksize,
      quant_type,        nested_absmax, nested_code, nested_offset, nested_blocksize};
  check_dequantize_4bit(weight, dtype);
  check_dequantize_4bit_out(weight, dtype, out);
  if (out.is_contiguous()) {
    dequantize_range(kernel_view(weight), 0, out.numel(), out.mutable_data_ptr(), dtype_of(out));
  } else {
    torch::stable::copy_(out, dequantized(weight, dtype));
  }
}

template <class Index>
void look_up(const Tensor& indices, const Weight4bitArguments& arguments, Tensor& out) {
  const auto* index = data_of<Index>(indices);
  const int64_t rows = arguments.shape[0], width = arguments.shape[1], n = indices.numel();
  for (int64_t i = 0; i < n; ++i) {
    BNBOPS_CHECK(index[i] >= 0 && index[i] < rows, "bnbops::embedding_4bit: index ", index[i], " at position ", i,
                 " is out of range; the table has ", rows, " rows");
  }
  const Kernels& kernels = *isa().kernels;
  const Weight4bit weight = kernel_view(arguments);
  const DType dtype = dtype_of(out);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t row_bytes = width * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(0, n, divide_up(kGrain, std::max<int64_t>(width, 1)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      kernels.dequantize_4bit(weight, index[i] * width, width, to + i * row_bytes, dtype, false);
    }
  });
}

Tensor embedding_4bit(const Tensor& indices, const Tensor& weight, const Tensor& absmax, std::vector<int64_t> shape,
                      int64_t blocksize, std::string quant_type, ScalarType dtype, OptionalTensor nested_absmax,
                      OptionalTensor nested_code, OptionalTensor nested_offset, int64_t nested_blocksize) {
  const Weight4bitArguments table{"embedding_4bit", "weight",   weight,        absmax,      shape,
                                  blocksize,        quant_type, nested_absmax, nested_code, nested_offset,
                                  nested_blocksize};
  check_embedding_4bit(indices, table, dtype);
  const Tensor in_order = in_logical_order(indices);
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(shape[1]);
  Tensor out = torch::stable::new_empty(weight, sizes, dtype);
  indices.scalar_type() == ScalarType::Int ? look_up<int32_t>(in_order, table, out)
                                           : look_up<int64_t>(in_order, table, out);
  return out;
}

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&bnbops::cpu::quantize_4bit));
  m.impl("dequantize_4bit", TORCH_BOX(&bnbops::cpu::dequantize_4bit));
  m.impl("dequantize_4bit.out", TORCH_BOX(&bnbops::cpu::dequantize_4bit_out));
  m.impl("embedding_4bit", TORCH_BOX(&bnbops::cpu::embedding_4bit));
}
