// The operators on states outside a step, on CUDA devices.
#include "ops/optimizer/state_codes.h"
#include "cuda/binding.h"
#include "cuda/optimizer_kernels.h"

namespace bnbops::cuda {
namespace {

struct StatesOnCuda : OnDevice {
  using OnDevice::OnDevice;

  void encode(const StateJob& job) const {
    check_launch(encode_state(job, stream()), "encode_state of ", job.blocks, " blocks");
  }
  void decode(const StateJob& job) const {
    check_launch(decode_state(job, stream()), "decode_state of ", job.blocks, " blocks");
  }
};

}  // namespace
}  // namespace bnbops::cuda

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, BNBOPS_DEVICE_KEY, m) {
  bnbops::StateOperators<bnbops::cuda::StatesOnCuda>::implement(m);
}
