// What lets one source build for the host, per instruction set, and for CUDA devices.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BNBOPS_HD __host__ __device__ __forceinline__
#else
#define BNBOPS_HD inline __attribute__((always_inline))
#endif

// The same inline function is compiled once per instruction set. Each copy lives in its own namespace, or the linker
// would merge them and might hand AVX-512 code to a machine that lacks it.
#ifndef BNBOPS_ISA
#define BNBOPS_ISA portable
#endif
#define BNBOPS_NAMESPACE_BEGIN \
  namespace bnbops {           \
  inline namespace BNBOPS_ISA {
#define BNBOPS_NAMESPACE_END \
  }                          \
  }

BNBOPS_NAMESPACE_BEGIN

constexpr float kFloatMax = 3.40282346638528859812e+38F;

// The one NaN that operators write, as 16 bits its upper half in either format: a GPU's own, of arithmetic and of
// rounding. A CPU's has another sign or the payload of whatever it came from.
constexpr uint32_t kNanBits = 0x7FFFFFFFU;
constexpr uint16_t kNanHalfBits = kNanBits >> 16;

BNBOPS_HD float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

BNBOPS_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

BNBOPS_HD float with_one_nan(float x) { return x == x ? x : float_from_bits(kNanBits); }

// One rounding, on every backend. The library is built without contraction, so this is the only fused operation.
BNBOPS_HD float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

BNBOPS_HD float square_root(float x) { return __builtin_sqrtf(x); }

// False for infinities and NaN.
BNBOPS_HD bool is_finite(float x) { return (bits_of(x) & 0x7FFFFFFFU) < 0x7F800000U; }

BNBOPS_HD bool is_number(float x) { return x == x; }

BNBOPS_HD bool is_finite(double x) { return x - x == 0; }

// x^n for a whole n >= 0, by squaring: products alone have the same bits everywhere, which a library's pow has not.
BNBOPS_HD double power(double x, double n) {
  constexpr double kMost = 9007199254740992.0;  // 2^53: all that a loop of 54 rounds can count
  double result = 1;
  for (auto left = static_cast<uint64_t>(n < kMost ? n : kMost); left > 0; left /= 2) {
    if (left % 2 != 0) result *= x;
    x *= x;
  }
  return result;
}

// a / b where b is positive, else 0.
BNBOPS_HD float divide_by_positive(float a, float b) { return b > 0 ? a / b : 0.0F; }

// -1, 0 or 1.
BNBOPS_HD float sign_of(float x) { return x > 0 ? 1.0F : x < 0 ? -1.0F : 0.0F; }

BNBOPS_HD float select(bool condition, float a, float b) { return condition ? a : b; }

BNBOPS_NAMESPACE_END
