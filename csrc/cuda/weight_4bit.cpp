// The operators that quantize, dequantize and look up 4-bit weights, on CUDA devices.
#include "cuda/binding.h"
#include "cuda/weight_4bit_kernels.h"
#include "ops/weight_4bit/weight_4bit_binding.h"

namespace bnbops::cuda {
namespace {

struct Weight4bitOnCuda : OnDevice {
  using OnDevice::OnDevice;

  static void check_indices(const Tensor& /*indices*/, int64_t /*rows*/) {}  // the kernel does

  void quantize(const QuantizeJob& job) const {
    check_launch(quantize_4bit(job, stream()), "quantize_4bit of ", job.numel, " elements in blocks of ",
                 job.blocksize);
  }
  void dequantize(const Weight4bit& weight, int64_t numel, void* out, DType dtype) const {
    check_launch(dequantize_4bit(weight, numel, out, dtype, stream()), "dequantize_4bit of ", numel,
                 " elements in blocks of ", weight.blocksize);
  }
  void look_up(const LookUpJob& job) const {
    check_launch(look_up_4bit(job, stream()), "embedding_4bit of ", job.count, " rows of ", job.width, " elements");
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::Weight4bitOperators<bnbops::cuda::Weight4bitOnCuda>::implement(m);
}
