// What every CUDA operator does around its launches.
#pragma once

#include <cuda_runtime_api.h>

#include "core/host_values.h"

#ifndef CUSIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace bnbops::cuda {

// Makes a tensor's device current for as long as it lives.
class OnDevice {
 public:
  static Tensor new_result(const Tensor& like, Sizes sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, sizes, dtype);
  }

#ifdef CUSIM
  explicit OnDevice(const Tensor& /*like*/) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {}

  // The current stream of that device.
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A fresh tensor of one dimension, whose memory comes from torch: in the order of the stream.
inline Tensor fresh(const Tensor& like, int64_t numel, ScalarType dtype) {
  return torch::stable::new_empty(like, {numel}, dtype);
}

// Whether vectors of 16 bytes can be read from its beginning on, as from that of every new tensor.
inline bool is_aligned(const Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
}

// What a launch said: `work` describes it, "quantize_blockwise of 4096 elements in blocks of 256".
template <class... Work>
void check_launch(cudaError_t error, const Work&... work) {
  if (error == cudaSuccess) return;
  const char* advice = "";
  if (error == cudaErrorNoKernelImageForDevice) {
    advice = "; this build has no kernels for this GPU: rebuild with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native";
  } else if (error == cudaErrorInsufficientDriver) {
    advice = "; the NVIDIA driver is older than the CUDA toolkit that built bnbops: update it";
  }
  fail("bnbops::", work..., ": CUDA could not launch the kernel: ", cudaGetErrorString(error), advice);
}

}  // namespace bnbops::cuda
