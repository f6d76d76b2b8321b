// One lane: plain C++ for any machine, and the meaning of every operation that the SIMD lanes have.
#pragma once

#include "core/lines.h"
#include "core/nibbles.h"

BNBOPS_NAMESPACE_BEGIN

struct ScalarLanes {
  static constexpr int kWidth = 1;
  using Float = float;
  using Int = int32_t;
  using Number = float;  // what rules compute with

  struct Table32 {
    const uint32_t* bits;
    BNBOPS_HD explicit Table32(const uint32_t* table) : bits(table) {}
    BNBOPS_HD Float operator[](Int i) const { return float_from_bits(bits[i & 31]); }
  };
  // What lines say of a magnitude.
  struct Place {
    Float value, offset;
  };
  struct Pieces {
    const PieceLines& lines;
    BNBOPS_HD explicit Pieces(const PieceLines& all) : lines(all) {}
    BNBOPS_HD Place operator()(Float a) const {
      const uint32_t i = (bits_of(a) + lines.carry[bits_of(a) >> 23 & (kOctaves - 1)]) >> 23;
      return {fused_multiply_add(a, lines.slope[i], lines.offset[i]), lines.offset[i]};
    }
  };

  BNBOPS_HD static Float splat(float x) { return x; }
  BNBOPS_HD static Int splat_int(int x) { return x; }
  BNBOPS_HD static Float mul(Float a, Float b) { return a * b; }
  BNBOPS_HD static Float fma(Float a, Float b, Float c) { return fused_multiply_add(a, b, c); }
  BNBOPS_HD static Float with_one_nan(Float x) { return bnbops::with_one_nan(x); }
  BNBOPS_HD static Float abs(Float x) { return float_from_bits(bits_of(x) & 0x7FFFFFFFU); }
  BNBOPS_HD static Float min(Float a, Float b) { return a < b ? a : b; }
  BNBOPS_HD static Float select_if_less(Float a, Float b, Float x, Float y) { return a < b ? x : y; }
  BNBOPS_HD static Int add(Int i, int x) { return i + x; }
  BNBOPS_HD static Int max(Int a, Int b) { return a > b ? a : b; }
  BNBOPS_HD static Int as_int(Float x) { return static_cast<Int>(bits_of(x)); }
  template <int kBits>
  BNBOPS_HD static Int shift_right(Int i) {
    return static_cast<Int>(static_cast<uint32_t>(i) >> kBits);
  }
  BNBOPS_HD static Int add_if_less(Int i, int step, Float a, Float b) { return a < b ? i + step : i; }
  BNBOPS_HD static Float gather(const float* table, Int i) { return table[i]; }
  BNBOPS_HD static Int gather(const uint8_t* table, Int i) { return table[i]; }  // may read 3 bytes more
  // To nearest, ties to even, by the float adder: 0 <= x < 2^22.
  BNBOPS_HD static Int round(Float x) { return as_int(x + 12582912.0F) - 0x4B400000; }
  // -x where `sign` is positive, else x.
  BNBOPS_HD static Int round_against_sign(Float x, Float sign) { return (bits_of(sign) >> 31) ? round(x) : -round(x); }
  // 0 where a is not less than b.
  BNBOPS_HD static Int round_if_less(Float a, Float b, Float x) { return a < b ? (x < 0 ? -round(-x) : round(x)) : 0; }

  // Four vectors of codes: 127 - k, saturated.
  BNBOPS_HD static void store_signed(const Int (&k)[4], uint8_t* codes) {
    for (int i = 0; i < 4; ++i) codes[i] = static_cast<uint8_t>(127 - (k[i] > 127 ? 127 : k[i]));
  }
  BNBOPS_HD static void store_codes(const Int (&k)[4], uint8_t* codes) {
    for (int i = 0; i < 4; ++i) codes[i] = static_cast<uint8_t>(k[i]);
  }
  // Four vectors of 4-bit codes, two to a byte.
  BNBOPS_HD static void store_nibbles(const Int (&k)[4], Nibbles nibbles, uint8_t* bytes) {
    const int first = nibble_shift(nibbles, 0), second = nibble_shift(nibbles, 1);
    for (int i = 0; i < 2; ++i) bytes[i] = static_cast<uint8_t>(k[2 * i] << first | k[2 * i + 1] << second);
  }

#if !defined(__CUDACC__)
  // The values of 4 * kWidth codes' numbers by lines, a vector at a time.
  template <bool kSigned>
  struct Octaves {
    const OctaveLines& lines;
    explicit Octaves(const OctaveLines& all) : lines(all) {}
    BNBOPS_HD static const uint8_t* open(const uint8_t* codes) { return codes; }
    BNBOPS_HD Float operator()(const uint8_t* codes, int v) const {
      const int number = kSigned ? codes[v] - 127 : codes[v] + 1, n = number < 0 ? -number : number;
      if (n == 0) return 0;
      const int i = 31 - __builtin_clz(n);
      const Float value = fused_multiply_add(static_cast<Float>(n), lines.slope[i], lines.base[i]);
      return number < 0 ? -value : value;
    }
  };

  // Likewise numbers of float8_e4m3fn, in units of kFloat8Unit.
  BNBOPS_HD static const uint8_t* open_float8(const uint8_t* codes) { return codes; }
  BNBOPS_HD static Float float8(const uint8_t* codes, int v) {
    const auto half = static_cast<uint16_t>((codes[v] & 0x80) << 8 | (codes[v] & 0x7F) << 7);
    return load_float16(&half);
  }

  BNBOPS_HD static bool all_finite(Float x) { return is_finite(x); }
  // The larger one of m >= 0 and |x|, or x itself where it is not negative; m where x is NaN.
  template <bool kSigned>
  BNBOPS_HD static Float larger(Float m, Float x) {
    const Float magnitude = kSigned ? abs(x) : x;
    return magnitude > m ? magnitude : m;
  }

  // Copies a tail, of at most a group's elements.
  BNBOPS_HD static void copy(void* to, const void* from, int64_t bytes) { memcpy(to, from, bytes); }

  // A codebook prepared for decoding 4 * kWidth codes at a time.
  struct Codebook {
    static constexpr int kPerByte = 1;
    const float* values;
    explicit Codebook(const float* table) : values(table) {}
    BNBOPS_HD void decode(const uint8_t* codes, float scale, Float (&out)[4]) const {
      for (int i = 0; i < 4; ++i) out[i] = values[codes[i]] * scale;
    }
  };

  // Likewise for 16 entries and two codes a byte.
  struct Codebook4bit {
    static constexpr int kPerByte = 2;
    const float* values;
    Nibbles nibbles;
    Codebook4bit(const float* table, Nibbles order) : values(table), nibbles(order) {}
    // The values of the codes in the lowest 4 bits.
    BNBOPS_HD Float lookup(Int codes) const { return values[codes & 15]; }
    BNBOPS_HD void decode(const uint8_t* codes, float scale, Float (&out)[4]) const {
      for (int i = 0; i < 4; ++i) out[i] = lookup(codes[i / 2] >> nibble_shift(nibbles, i % 2)) * scale;
    }
  };

  // The same for values of 16 bits. Codes of kWidth bytes become a vector of values.
  struct HalfCodebook4bit {
    const uint16_t* values;
    Nibbles nibbles;
    HalfCodebook4bit(const uint16_t* table, Nibbles order) : values(table), nibbles(order) {}
    BNBOPS_HD Int decode(const uint8_t* source) const {
      const uint16_t first = values[*source >> nibble_shift(nibbles, 0) & 15];
      const uint16_t second = values[*source >> nibble_shift(nibbles, 1) & 15];
      return static_cast<Int>(first | static_cast<uint32_t>(second) << 16);
    }
  };

  // Repeats each scale for as many lanes as its block has dwords of codes.
  struct Spread {
    BNBOPS_HD explicit Spread(int /*dwords*/) {}
    BNBOPS_HD Float operator()(const float* scales) const { return *scales; }
  };

  BNBOPS_HD static Float load(const float* x) { return *x; }
  BNBOPS_HD static Int load_int(const uint8_t* bytes) {
    Int x;
    memcpy(&x, bytes, sizeof(x));
    return x;
  }
  BNBOPS_HD static void store(float* out, Float x) { *out = x; }
  BNBOPS_HD static void store_int(uint8_t* out, Int x) { memcpy(out, &x, sizeof(x)); }
  BNBOPS_HD static int32_t reduce_max(Int x) { return x; }
  BNBOPS_HD static float reduce_add(Float x) { return x; }

  BNBOPS_HD static Float load_bfloat16(const uint16_t* x) { return float_from_bits(static_cast<uint32_t>(*x) << 16); }
  BNBOPS_HD static void store_bfloat16(uint16_t* out, Float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;  // to nearest, ties to even
    *out = static_cast<uint16_t>(x != x ? kNanHalfBits : rounded);
  }
  BNBOPS_HD static Float load_float16(const uint16_t* x) {
    _Float16 half;
    memcpy(&half, x, sizeof(half));
    return static_cast<float>(half);
  }
  BNBOPS_HD static void store_float16(uint16_t* out, Float x) {
    const auto half = static_cast<_Float16>(with_one_nan(x));
    memcpy(out, &half, sizeof(half));
  }

  // The lanes for bfloat16 elements of coded states: others where its pairs are better taken apart.
  static constexpr bool kPairs = false;
  using Paired = ScalarLanes;

  // These lanes with stores past the caches, where there are such: `store` and `store_int` to whole aligned cache
  // lines, one after the other. `fence` orders them before whatever follows.
  struct PastCaches;
#endif
};

#if !defined(__CUDACC__)
struct ScalarLanes::PastCaches : ScalarLanes {
  static void fence() {}
};
#endif

BNBOPS_NAMESPACE_END
