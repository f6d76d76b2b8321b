// Kernels that each break one rule, so that tests/cuda/test_cuda_static.py can see it noticed.
#include "cuda/threads.h"

namespace bnbops::cuda {

constexpr int kMany = 64;

// Keeps more numbers than its registers hold.
__global__ void __launch_bounds__(kThreads, 8) spilling_kernel(const float* from, float* to) {
  float x[kMany];
#pragma unroll
  for (int i = 0; i < kMany; ++i) x[i] = from[i * kThreads + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMany; ++i) to[i * kThreads + threadIdx.x] = x[i] + x[kMany - 1 - i];
}

// Indexes an array by numbers that are not known.
__global__ void __launch_bounds__(kThreads, kResident) array_kernel(const int* from, int* to) {
  int x[kMany];
  for (int i = 0; i < kMany; ++i) x[from[i] % kMany] = i;
  to[threadIdx.x] = x[from[threadIdx.x] % kMany];
}

// Reads what lies side by side one by one.
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(const float* from, uint2* to) {
  const float* x = from + threadIdx.x * 2;
  to[threadIdx.x] = make_uint2(static_cast<uint32_t>(x[0]), static_cast<uint32_t>(x[1]));
}

__global__ void __launch_bounds__(kThreads, kResident) unheard_of_kernel(float* to) { to[threadIdx.x] = 0; }

// Multiplies and adds in one, as a compiler does that may.
__global__ void __launch_bounds__(kThreads, kResident) contracted_kernel(const float* from, float* to) {
  asm("fma.rn.f32 %0, %1, %1, %1;" : "=f"(to[threadIdx.x]) : "f"(from[threadIdx.x]));
}

__global__ void __launch_bounds__(kThreads, kResident) approximate_kernel(const float* from, float* to) {
  to[threadIdx.x] = __fdividef(from[threadIdx.x], from[0]);
}

// Wants more shared memory than so many thread blocks can have.
__global__ void __launch_bounds__(kThreads, kResident) crowded_kernel(const float* from, float* to) {
  __shared__ float x[kThreads][44];
  for (int i = 0; i < 44; ++i) x[threadIdx.x][i] = from[i];
  __syncthreads();
  to[threadIdx.x] = x[from[threadIdx.x] > 0][threadIdx.x % 44];
}

__global__ void unbounded_kernel(float* to) { to[threadIdx.x] = 0; }

}  // namespace bnbops::cuda
