// The operators on blocks of 8-bit codes on the CPU: (de)quantization, and that of states outside a step.
#include "cpu/binding.h"
#include "ops/blockwise/blockwise_binding.h"
#include "ops/optimizer/state_codes.h"

namespace bnbops::cpu {
namespace {

struct BlocksOnCpu : OnCpu {
  using OnCpu::OnCpu;

  static void check_sorted(const Tensor& code) {
    const auto* value = data_of<float>(code);
    for (int64_t i = 0; i + 1 < code.numel(); ++i) {
      BNBOPS_CHECK(value[i] <= value[i + 1],
                   "bnbops::quantize_blockwise: code must be sorted in ascending order, but code[", i, "] = ", value[i],
                   " and code[", i + 1, "] = ", value[i + 1]);
    }
  }

  static void quantize(const QuantizeJob& job) {
    in_parallel(divide_up(job.numel, job.blocksize), job.blocksize, isa().kernels->quantize, job);
  }
  static void dequantize(const DequantizeJob& job) {
    in_parallel(divide_up(job.numel, kChunk), kChunk, isa().kernels->dequantize, job);
  }
  static void encode(const StateJob& job) { in_parallel(job.blocks, kStateBlock, isa().steps->encode, job); }
  static void decode(const StateJob& job) { in_parallel(job.blocks, kStateBlock, isa().steps->decode, job); }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) {
  bnbops::BlockwiseOperators<bnbops::cpu::BlocksOnCpu>::implement(m);
  bnbops::StateOperators<bnbops::cpu::BlocksOnCpu>::implement(m);
}
