// CUDA's qualifiers, vector types and error codes: what host code needs, too.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUSIM_VECTOR2(scalar, name)         \
  struct alignas(2 * sizeof(scalar)) name { \
    scalar x, y;                            \
  };                                        \
  constexpr name make_##name(scalar x, scalar y) { return {x, y}; }

#define CUSIM_VECTOR4(scalar, name)         \
  struct alignas(4 * sizeof(scalar)) name { \
    scalar x, y, z, w;                      \
  };                                        \
  constexpr name make_##name(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

CUSIM_VECTOR2(signed char, char2)
CUSIM_VECTOR4(signed char, char4)
CUSIM_VECTOR2(unsigned char, uchar2)
CUSIM_VECTOR4(unsigned char, uchar4)
CUSIM_VECTOR2(short, short2)
CUSIM_VECTOR4(short, short4)
CUSIM_VECTOR2(unsigned short, ushort2)
CUSIM_VECTOR4(unsigned short, ushort4)
CUSIM_VECTOR2(int, int2)
CUSIM_VECTOR4(int, int4)
CUSIM_VECTOR2(unsigned, uint2)
CUSIM_VECTOR4(unsigned, uint4)
CUSIM_VECTOR2(float, float2)
CUSIM_VECTOR4(float, float4)
CUSIM_VECTOR2(double, double2)
CUSIM_VECTOR2(long long, longlong2)
CUSIM_VECTOR2(unsigned long long, ulonglong2)
#undef CUSIM_VECTOR2
#undef CUSIM_VECTOR4

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrManagedMemory = 83,
  cudaDevAttrConcurrentManagedAccess = 89,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

constexpr unsigned cudaMemAttachGlobal = 1;
