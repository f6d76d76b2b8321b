// The operators that quantize, dequantize and look up 4-bit weights, on the CPU.
#include "ops/weight_4bit/weight_4bit_binding.h"

#include <algorithm>

#include "cpu/decode_4bit.h"
#include "cpu/memory.h"

namespace bnbops::cpu {

constexpr int64_t kGrain = 32768;  // elements worth a thread

void dequantize_range(const Weight4bit& weight, int64_t first, int64_t numel, void* out, DType dtype) {
  const auto kernel = isa().kernels->dequantize_4bit;
  const int64_t size = size_of(dtype);
  constexpr int64_t kLines = 64;  // elements; a multiple of it fills whole lines in every dtype
  const bool past_caches =
      first % kLines == 0 && weight.blocksize % kLines == 0 && worth_past_caches(out, numel * size);
  torch::stable::parallel_for(0, divide_up(numel, kChunk), kGrain / kChunk, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kChunk, to = std::min(numel, end * kChunk);
    kernel(weight, first + from, to - from, static_cast<uint8_t*>(out) + from * size, dtype, past_caches);
  });
}

namespace {

struct Weight4bitOnCpu {
  explicit Weight4bitOnCpu(const Tensor& /*like*/) {}

  static void prepare(Tensor& fresh) { prefer_huge_pages(fresh); }

  static void check_indices(const Tensor& indices, int64_t rows) {
    indices.scalar_type() == ScalarType::Long ? check_each<int64_t>(indices, rows) : check_each<int32_t>(indices, rows);
  }

  void quantize(const QuantizeJob& job) const {
    const auto kernel = isa().kernels->quantize_4bit;
    torch::stable::parallel_for(0, divide_up(job.numel, job.blocksize), divide_up(kGrain, job.blocksize),
                                [&](int64_t first, int64_t last) { kernel(job, first, last); });
  }

  void dequantize(const Weight4bit& weight, int64_t numel, void* out, DType dtype) const {
    dequantize_range(weight, 0, numel, out, dtype);
  }

  void look_up(const LookUpJob& job) const {
    const auto kernel = isa().kernels->dequantize_4bit;
    const int64_t width = job.width, row_bytes = width * size_of(job.dtype),
                  grain = divide_up(kGrain, std::max<int64_t>(width, 1));
    torch::stable::parallel_for(0, job.count, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        kernel(job.weight, job.index(i) * width, width, static_cast<uint8_t*>(job.out) + i * row_bytes, job.dtype,
               false);
      }
    });
  }

 private:
  template <class Index>
  static void check_each(const Tensor& indices, int64_t rows) {
    const auto* index = data_of<Index>(indices);
    for (int64_t i = 0; i < indices.numel(); ++i) {
      BNBOPS_CHECK(index[i] >= 0 && index[i] < rows, "bnbops::embedding_4bit: index ", index[i], " at position ", i,
                   " is out of range; the table has ", rows, " rows");
    }
  }
};

}  // namespace
}  // namespace bnbops::cpu

STABLE_TORCH_LIBRARY_IMPL(bnbops, CPU, m) { bnbops::Weight4bitOperators<bnbops::cpu::Weight4bitOnCpu>::implement(m); }
