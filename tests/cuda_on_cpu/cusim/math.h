// Arithmetic whose bits CUDA defines. Compile with -ffp-contract=off: the compiler then fuses nothing by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cusim {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 16-bit floats by their bits, rounded to nearest, ties to even.
inline float from_bfloat16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline float from_float16(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }

// NaN becomes 0x7FFF, as by the device's cvt.
inline uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float x) { return x != x ? 0x7FFF : bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// A number if there is one; +0 is above -0. The host's library leaves the sign of a zero open.
template <class T>
T min_number(T a, T b) {
  if (a != a) return b;
  if (a == b) return std::signbit(a) ? a : b;
  return b < a ? b : a;
}

template <class T>
T max_number(T a, T b) {
  if (a != a) return b;
  if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}

// cvt to a 32-bit integer: `x`, already rounded, is clamped; NaN gives 0. The host's conversion leaves both open.
template <class Int>
Int saturate(double x) {
  if (x != x) return 0;
  if (x <= static_cast<double>(std::numeric_limits<Int>::min())) return std::numeric_limits<Int>::min();
  if (x >= static_cast<double>(std::numeric_limits<Int>::max())) return std::numeric_limits<Int>::max();
  return static_cast<Int>(x);
}

enum class Prmt { kGeneral, kForward4, kBackward4, kReplicate8, kClampLeft, kClampRight, kReplicate16 };

// prmt.b32: bytes of y:x by the four nibbles of `selector`, bit 3 of which replicates the byte's sign; the other modes
// (f4e, b4e, rc8, ecl, ecr, rc16) use its low two bits.
inline unsigned prmt(unsigned x, unsigned y, unsigned selector, Prmt mode = Prmt::kGeneral) {
  static constexpr uint16_t kSelectors[][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, {0x0000, 0x1111, 0x2222, 0x3333},
      {0x3210, 0x3211, 0x3222, 0x3333}, {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232},
  };
  if (mode != Prmt::kGeneral) selector = kSelectors[static_cast<int>(mode) - 1][selector & 3];
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    const unsigned sign = byte & 128 ? 255 : 0;
    result |= (nibble & 8 ? sign : byte) << 8 * i;
  }
  return result;
}

template <class Sum, class A, class B>
Sum dot4(unsigned a, unsigned b, Sum sum) {
  unsigned total = static_cast<unsigned>(sum);  // wraps
  for (int i = 0; i < 32; i += 8) {
    total += static_cast<unsigned>(static_cast<A>(a >> i) * static_cast<B>(b >> i));
  }
  return static_cast<Sum>(total);
}

}  // namespace cusim

#define fminf(a, b) cusim::min_number<float>(a, b)
#define fmaxf(a, b) cusim::max_number<float>(a, b)

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return cusim::min_number(a, b);
  return b < a ? b : a;
}

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return cusim::max_number(a, b);
  return a < b ? b : a;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0F / a; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __saturatef(float a) { return a != a ? 0.0F : fminf(fmaxf(a, 0.0F), 1.0F); }

inline int __float2int_rn(float a) { return cusim::saturate<int>(__builtin_nearbyintf(a)); }
inline int __float2int_rz(float a) { return cusim::saturate<int>(__builtin_truncf(a)); }
inline int __float2int_rd(float a) { return cusim::saturate<int>(__builtin_floorf(a)); }
inline int __float2int_ru(float a) { return cusim::saturate<int>(__builtin_ceilf(a)); }
inline unsigned __float2uint_rn(float a) { return cusim::saturate<unsigned>(__builtin_nearbyintf(a)); }
inline unsigned __float2uint_rz(float a) { return cusim::saturate<unsigned>(__builtin_truncf(a)); }
inline unsigned __float2uint_rd(float a) { return cusim::saturate<unsigned>(__builtin_floorf(a)); }
inline unsigned __float2uint_ru(float a) { return cusim::saturate<unsigned>(__builtin_ceilf(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }

inline float __int_as_float(int a) { return cusim::bit_cast<float>(a); }
inline float __uint_as_float(unsigned a) { return cusim::bit_cast<float>(a); }
inline int __float_as_int(float a) { return cusim::bit_cast<int>(a); }
inline unsigned __float_as_uint(float a) { return cusim::bit_cast<unsigned>(a); }

// Unlike prmt, this function ignores bit 3 of the selector's nibbles (nvcc masks it with 0x7777).
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) { return cusim::prmt(x, y, selector & 0x7777); }

inline int __dp4a(int a, int b, int sum) { return cusim::dot4<int, int8_t, int8_t>(a, b, sum); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  return cusim::dot4<unsigned, uint8_t, uint8_t>(a, b, sum);
}

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(a) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }

inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (a >> i & 1) << (31 - i);
  return reversed;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }

// 32 bits of high:low, shifted by shift modulo 32 (l, r) or by at most 32 (lc, rc).
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (static_cast<uint64_t>(high) << 32 | low) >> (shift & 31);
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

[[noreturn]] inline void __trap() { __builtin_trap(); }
