// The (de)quantization operators on CUDA devices.
#include "cuda/binding.h"
#include "cuda/kernels.h"
#include "ops/blockwise/blockwise_binding.h"

namespace bnbops::cuda {
namespace {

struct BlockwiseOnCuda : OnDevice {
  using OnDevice::OnDevice;

  static void check_sorted(const Tensor& /*code*/) {}  // reading it would wait for the device

  void quantize(const QuantizeJob& job) const {
    check_launch(cuda::quantize(job, stream()), "quantize_blockwise of ", job.numel, " elements in blocks of ",
                 job.blocksize);
  }
  void dequantize(const DequantizeJob& job) const {
    check_launch(cuda::dequantize(job, stream()), "dequantize_blockwise of ", job.numel, " elements in blocks of ",
                 job.blocksize);
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::BlockwiseOperators<bnbops::cuda::BlockwiseOnCuda>::implement(m);
}
