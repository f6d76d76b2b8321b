// In place of the CUDA toolkit's header, the runtime as host code calls it: errors, the device, memory.
#pragma once

#include <cstdlib>
#include <cstring>
#include <utility>

#include "cusim/types.h"

namespace cusim {

constexpr size_t kSharedAtMost = 227 * 1024;  // of compute capability 9.0
constexpr size_t kManagedAlignment = 256;     // of what cudaMallocManaged returns, like that of cudaMalloc

inline cudaError_t last_error = cudaSuccess;

// As the runtime remembers it until cudaGetLastError.
inline cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace cusim

inline cudaError_t cudaPeekAtLastError() { return cusim::last_error; }

inline cudaError_t cudaGetLastError() { return std::exchange(cusim::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A small device of compute capability 9.0: few multiprocessors make persistent kernels loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cusim::failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrManagedMemory: *value = 1; return cudaSuccess;
    case cudaDevAttrConcurrentManagedAccess: *value = 1; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cusim::kSharedAtMost; return cudaSuccess;
  }
  return cusim::failed(cudaErrorInvalidValue);
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMallocManaged(void** memory, size_t bytes, unsigned flags) {
  if (bytes == 0 || flags != cudaMemAttachGlobal) return cusim::failed(cudaErrorInvalidValue);
  if (posix_memalign(memory, cusim::kManagedAlignment, bytes) == 0) return cudaSuccess;
  return cusim::failed(cudaErrorMemoryAllocation);
}

inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
