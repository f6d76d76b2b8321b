// The functions of csrc/cuda/device.h that are instructions or qualities of a GPU.
#pragma once

#include "cusim/cusim.h"

#define DEVICE_ASSERT(condition, text) (static_cast<bool>(condition) ? void() : cusim::fail("%s", text))

namespace bnbops::cuda {

template <class T>
__forceinline__ T* global_pointer(T* pointer) {
  return pointer;
}

__forceinline__ const char* in_one_register(const void* shared) { return static_cast<const char*>(shared); }

__forceinline__ float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

template <uint32_t kSelector>
__forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b) {
  return cusim::prmt(a, b, kSelector);
}

__forceinline__ float from_float16(uint32_t bits) { return cusim::from_float16(static_cast<uint16_t>(bits)); }

__forceinline__ uint32_t pack_bfloat16(float first, float second) {
  return cusim::to_bfloat16(first) | static_cast<uint32_t>(cusim::to_bfloat16(second)) << 16;
}

__forceinline__ uint32_t pack_float16(float first, float second) {
  return cusim::to_float16(first) | static_cast<uint32_t>(cusim::to_float16(second)) << 16;
}

__forceinline__ void set_flag(bool* flag) { __atomic_store_n(flag, true, __ATOMIC_RELAXED); }

}  // namespace bnbops::cuda
