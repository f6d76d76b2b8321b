// The (de)quantization operators on the CPU.
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "ops/blockwise/blockwise_binding.h"

namespace bnbops::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth a thread

struct BlockwiseOnCpu {
  explicit BlockwiseOnCpu(const Tensor& /*like*/) {}

  static void check_sorted(const Tensor& code) {
    const auto* value = data_of<float>(code);
    for (int64_t i = 0; i + 1 < code.numel(); ++i) {
      BNBOPS_CHECK(value[i] <= value[i + 1],
                   "bnbops::quantize_blockwise: code must be sorted in ascending order, but code[", i, "] = ", value[i],
                   " and code[", i + 1, "] = ", value[i + 1]);
    }
  }

  static void prepare(Tensor& fresh) { prefer_huge_pages(fresh); }

  void quantize(const QuantizeJob& job) const {
    const auto kernel = isa().kernels->quantize;
    torch::stable::parallel_for(0, divide_up(job.numel, job.blocksize), divide_up(kGrain, job.blocksize),
                                [&](int64_t first, int64_t last) { kernel(job, first, last); });
  }

  void dequantize(const DequantizeJob& job) const {
    const auto kernel = isa().kernels->dequantize;
    torch::stable::parallel_for(0, divide_up(job.numel, kChunk), kGrain / kChunk,
                                [&](int64_t first, int64_t last) { kernel(job, first, last); });
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::BlockwiseOperators<bnbops::cpu::BlockwiseOnCpu>::implement(m); }
