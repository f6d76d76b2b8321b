// An operator whose kernel can be told to have a bug: what a sanitizer must see from within Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cusim/cusim.h"

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 64;

// y[i] = x[i - 1] within each block, whose first element stays where it is.
template <bool race>
__global__ void shift(const float* x, float* y, int n) {
  __shared__ float tile[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) tile[threadIdx.x] = x[i];
  if (!race) __syncthreads();
  if (i < n) y[i] = tile[threadIdx.x ? threadIdx.x - 1 : 0];
}

// Reads and writes `beyond` elements more than there are.
Tensor run(const Tensor& x, int64_t beyond, bool race) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  Tensor y = torch::stable::empty_like(x);
  const int n = static_cast<int>(x.numel() + beyond);
  const auto kernel = race ? shift<true> : shift<false>;
  LAUNCH(kernel, (n + kThreads - 1) / kThreads, kThreads, 0, nullptr, static_cast<const float*>(x.data_ptr()),
         static_cast<float*>(y.data_ptr()), n);
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "launch failed");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(cusim_selftest, m) { m.def("shift(Tensor x, int beyond, bool race) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(cusim_selftest, CPU, m) { m.impl("shift", TORCH_BOX(&run)); }
