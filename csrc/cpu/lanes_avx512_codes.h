// How Avx512Lanes take codes apart and put them together. Belongs to lanes_avx512.h.
#pragma once

#include "cpu/lanes_avx512.h"

BNBOPS_NAMESPACE_BEGIN

// A code's number goes to the upper byte of its dword, or the second one, where it is a float at once: times 2^24 or
// 2^8, which the slopes take back. Of 255 + 1, nothing is left but 0.
template <bool kSigned>
struct Avx512Lanes::Octaves {
  Float slope, base;
  Int spread[4];
  BNBOPS_HD explicit Octaves(const OctaveLines& lines) {
    alignas(64) float slopes[16] = {}, bases[16] = {};
    for (int e = 0; e < 8; ++e) {                           // the exponent's low bits are 7 + e
      const float sign = kSigned && e == 7 ? -1.0F : 1.0F;  // as a byte, 128 is -128
      slopes[7 + e] = sign * lines.slope[e] * (kSigned ? 0x1p-24F : 0x1p-8F);
      bases[7 + e] = sign * lines.base[e];
    }
    bases[0] = kSigned ? 0 : lines.base[8];
    slope = _mm512_load_ps(slopes);
    base = _mm512_load_ps(bases);
    for (int v = 0; v < 4; ++v) spread[v] = _mm512_mullo_epi32(element(v), splat_int(0x01010101));
  }
  // Of a vector's lanes.
  BNBOPS_HD static Int element(int v) {
    return add(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16 * v);
  }
  BNBOPS_HD static Int open(const uint8_t* codes) {
    return _mm512_sub_epi8(_mm512_loadu_si512(codes), _mm512_set1_epi8(kSigned ? 127 : -1));
  }
  BNBOPS_HD Float operator()(Int numbers, int v) const {
    constexpr __mmask64 kByte = kSigned ? 0x8888'8888'8888'8888 : 0x2222'2222'2222'2222;
    const Float n = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(kByte, spread[v], numbers));
    const Int octave = shift_right<23>(as_int(n));
    const Float from = _mm512_permutexvar_ps(octave, base);
    constexpr int kFlip = 0x78;  // from ^ (n & mask)
    const Int sign = _mm512_ternarylogic_epi32(as_int(from), as_int(n), splat_int(INT32_MIN), kFlip);
    return fma(n, _mm512_permutexvar_ps(octave, slope), kSigned ? _mm512_castsi512_ps(sign) : from);
  }
};

// Vectors 0 and 1 of a group of four have the even and the odd ones of its first 32 elements, vectors 2 and 3 those of
// the others: bfloat16 numbers are the halves of dwords then, and need no shuffling.
struct PairedOrder {
  uint8_t element[64];  // by vector and lane
  uint8_t packed[64];   // by element: where packing puts its byte
};
constexpr PairedOrder make_paired_order() {
  PairedOrder order{};
  for (int v = 0; v < 4; ++v) {
    for (int i = 0; i < 16; ++i) {
      const int element = 32 * (v / 2) + 2 * i + v % 2;
      order.element[16 * v + i] = static_cast<uint8_t>(element);
      order.packed[element] = static_cast<uint8_t>(16 * (i / 4) + 4 * v + i % 4);
    }
  }
  return order;
}
constexpr PairedOrder kPairedOrder = make_paired_order();

struct Avx512Lanes::Paired : Avx512Lanes {
  static constexpr bool kPairs = true;
  template <bool kSigned>
  struct Octaves : Avx512Lanes::Octaves<kSigned> {
    BNBOPS_HD explicit Octaves(const OctaveLines& lines) : Avx512Lanes::Octaves<kSigned>(lines) {
      const Int twice = _mm512_add_epi8(this->spread[0], this->spread[0]);
      for (int v = 0; v < 4; ++v) {
        this->spread[v] = _mm512_add_epi8(twice, _mm512_set1_epi8(static_cast<char>(kPairedOrder.element[kWidth * v])));
      }
    }
  };
  using Avx512Lanes::open_float8;
  BNBOPS_HD static Float8 open_float8(const uint8_t* codes) {
    return open_float8(_mm512_permutexvar_epi8(_mm512_loadu_si512(kPairedOrder.element), _mm512_loadu_si512(codes)));
  }
  BNBOPS_HD static Int in_order(Int packed) {
    return _mm512_permutexvar_epi8(_mm512_loadu_si512(kPairedOrder.packed), packed);
  }
  BNBOPS_HD static void store_signed(const Int (&k)[4], uint8_t* codes) {
    _mm512_storeu_si512(codes, in_order(packed_signed(k)));
  }
  BNBOPS_HD static void store_codes(const Int (&k)[4], uint8_t* codes) {
    _mm512_storeu_si512(codes, in_order(packed_codes(k)));
  }

  // Vector v of a group.
  BNBOPS_HD static Float load_bfloat16(const uint16_t* group, int v) {
    const Int pairs = _mm512_loadu_si512(group + 32 * (v / 2));
    return _mm512_castsi512_ps(v % 2 == 0 ? _mm512_slli_epi32(pairs, 16)
                                          : _mm512_and_si512(pairs, splat_int(INT32_MIN >> 15)));
  }
  // All finite.
  BNBOPS_HD static void store_bfloat16_group(uint16_t* out, const Float (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const Int even = shift_right<16>(rounded_to_bfloat16(x[2 * i])), odd = rounded_to_bfloat16(x[2 * i + 1]);
      constexpr __mmask32 kOdd = 0xAAAAAAAA;
      _mm512_storeu_si512(out + 32 * i, _mm512_mask_mov_epi16(even, kOdd, odd));
    }
  }
  BNBOPS_HD static void store_bfloat16_group_with_nan(uint16_t* out, Float (&x)[4]) {
    // The bits of a NaN that rounding leaves alone.
    for (Float& v : x)
      v = _mm512_castsi512_ps(_mm512_mask_mov_epi32(as_int(v), is_nan(v), splat_int(kNanHalfBits << 16)));
    store_bfloat16_group(out, x);
  }
};

BNBOPS_NAMESPACE_END
