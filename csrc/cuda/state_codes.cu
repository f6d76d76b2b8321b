// States outside a step: a warp has a block at a time.
#include "cuda/optimizer_kernels.h"
#include "cuda/states.h"

namespace bnbops::cuda {
namespace {

// Calls visit(place, role) for each block of this warp; the role is a constant.
template <class Visit>
BNBOPS_DEVICE void for_state_blocks(const StateJob& job, const Visit& visit) {
  for (int64_t block = int64_t{blockIdx.x} * kWarps + warp_of_block(); block < job.blocks;
       block += int64_t{gridDim.x} * kWarps) {
    const Place place = place_in(job, block);
    switch (job.role) {
      case Role::kSigned: visit(place, std::integral_constant<Role, Role::kSigned>{}); break;
      case Role::kSquare: visit(place, std::integral_constant<Role, Role::kSquare>{}); break;
      case Role::kSignedSquare: visit(place, std::integral_constant<Role, Role::kSignedSquare>{}); break;
      case Role::kMaster: break;  // has no codes
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResident) encode_state_kernel(const StateJob job) {
  const StateSlot slot{job.to, job.absmax, job.codec};
  for_state_blocks(job, [&](const Place& place, auto role) {
    float x[kOctet];
    to_floats(load_octet(job.from, DType::kFloat32, place.at, place.count), DType::kFloat32, x);
#pragma unroll
    for (float& value : x) value = encodable(value, has_sign(role));
    StateOf<AnyCodec, role>::store(slot, place, NoMaps{}, x);
  });
}

__global__ void __launch_bounds__(kThreads, kResident) decode_state_kernel(const StateJob job) {
  const StateSlot slot{const_cast<void*>(job.from), job.absmax, job.codec};
  for_state_blocks(job, [&](const Place& place, auto role) {
    Loaded codes;
    float x[kOctet];
    StateOf<AnyCodec, role>::load(slot, place, codes);
    StateOf<AnyCodec, role>::decode(slot, codes, NoMaps{}, x);
    store_octet(job.to, DType::kFloat32, place.at, place.count, x);
  });
}

}  // namespace

cudaError_t encode_state(const StateJob& job, cudaStream_t stream) {
  return launch(encode_state_kernel, grid_of_units(job.blocks), stream, job);
}
cudaError_t decode_state(const StateJob& job, cudaStream_t stream) {
  return launch(decode_state_kernel, grid_of_units(job.blocks), stream, job);
}

}  // namespace bnbops::cuda
