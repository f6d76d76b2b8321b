// What every CUDA operator does around its launches.
#pragma once

#include "cuda/runtime.h"
#include "tensors.h"

#ifndef CUSIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The simulator registers the same operators for the CPU, in a library of its own.
#ifndef BNBOPS_LIBRARY
#define BNBOPS_LIBRARY bnbops
#define BNBOPS_DEVICE_KEY CUDA
#endif

namespace bnbops::cuda {

// Makes a tensor's device current for as long as it lives.
class OnDevice {
 public:
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
