// Transposes in registers.
#pragma once

#include <immintrin.h>

#include "cpu/unrolled.h"

BNBOPS_NAMESPACE_BEGIN

// Element j of vector i becomes element i of vector j.
BNBOPS_HD void transpose_dwords(__m512i (&v)[16]) {
  __m512i t[16];
  unrolled<8>([&](auto i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  });
  unrolled<4>([&](auto g) {  // v[4 * g + j], quarter q: elements 4 * q + j of vectors 4 * g ... 4 * g + 3
    v[4 * g] = _mm512_unpacklo_epi64(t[4 * g], t[4 * g + 2]);
    v[4 * g + 1] = _mm512_unpackhi_epi64(t[4 * g], t[4 * g + 2]);
    v[4 * g + 2] = _mm512_unpacklo_epi64(t[4 * g + 1], t[4 * g + 3]);
    v[4 * g + 3] = _mm512_unpackhi_epi64(t[4 * g + 1], t[4 * g + 3]);
  });
  constexpr int kEven = 0x88, kOdd = 0xDD;  // quarters
  unrolled<4>([&](auto j) {
    const __m512i even_low = _mm512_shuffle_i32x4(v[j], v[4 + j], kEven);
    const __m512i even_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], kEven);
    const __m512i odd_low = _mm512_shuffle_i32x4(v[j], v[4 + j], kOdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], kOdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, kEven);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, kEven);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, kOdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, kOdd);
  });
  unrolled<16>([&](auto i) { v[i] = t[i]; });
}

BNBOPS_NAMESPACE_END
