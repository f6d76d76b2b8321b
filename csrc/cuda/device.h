// The language of the kernels: CUDA C++ under nvcc, or the simulator that runs them on the CPU (tests/cuda_on_cpu).
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "core/dtype.h"

#define BNBOPS_DEVICE __device__ __forceinline__

#ifdef CUSIM
#include "cusim/cusim.h"
#include "cusim/instructions.h"
#else
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

// As torch's own operators treat an index out of range: the message goes to stderr, and the next call that waits for
// the device raises "device-side assert triggered". Also in release builds.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept;
#define DEVICE_ASSERT(condition, text) \
  (static_cast<bool>(condition) ? void() : __assert_fail(text, __FILE__, __LINE__, __func__))

// One access of 4, 8 or 16 bytes; the simulator checks its alignment.
template <class T>
BNBOPS_DEVICE T load_vector(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
BNBOPS_DEVICE void store_vector(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

namespace bnbops::cuda {

// Tells the compiler, which does not know it of pointers read from memory, that this one is to global memory.
template <class T>
BNBOPS_DEVICE T* global_pointer(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// An address in shared memory as one number: the compiler shall not add up its parts for every access anew.
BNBOPS_DEVICE const char* in_one_register(const void* shared) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm("" : "+r"(address));
  return static_cast<const char*>(__cvta_shared_to_generic(address));
}

// NaN if one of them is.
BNBOPS_DEVICE float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// prmt.b32: four bytes of b:a, by the nibbles of the selector, bit 3 of which spreads the byte's sign over it.
template <uint32_t kSelector>
BNBOPS_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "n"(kSelector));
  return bytes;
}

// 16-bit floats are the bits that they have in memory.
BNBOPS_DEVICE float from_float16(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

// Two elements, rounded to nearest, ties to even; the first one in the lower half.
BNBOPS_DEVICE uint32_t pack_bfloat16(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
BNBOPS_DEVICE uint32_t pack_float16(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Several threads may set the same flag at the same time: a relaxed store, in PTX.
BNBOPS_DEVICE void set_flag(bool* flag) { *static_cast<volatile bool*>(flag) = true; }

}  // namespace bnbops::cuda
#endif

namespace bnbops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// visit(0) to visit(kCount - 1), without a loop: an array that it indexes lives in registers.
template <int kCount, class Visit>
BNBOPS_DEVICE void unrolled(const Visit& visit) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) visit(i);
}

template <class T>
BNBOPS_HD bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0;
}

BNBOPS_DEVICE float from_bfloat16(uint32_t bits) { return float_from_bits(bits << 16); }

BNBOPS_DEVICE uint32_t pack_halves(DType dtype, float first, float second) {
  return dtype == DType::kBFloat16 ? pack_bfloat16(first, second) : pack_float16(first, second);
}

BNBOPS_DEVICE float from_half(DType dtype, uint32_t bits) {
  return dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

}  // namespace bnbops::cuda
