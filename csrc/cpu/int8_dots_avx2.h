// Sums of products of int8 by AVX2: codes widened to int16 and multiplied in pairs, which cannot overflow.
#pragma once

#include <immintrin.h>

#include "cpu/unrolled.h"

BNBOPS_NAMESPACE_BEGIN

struct Avx2Dots {
  using Activation = int16_t;
  static constexpr int64_t kRowBlock = 32;
  static constexpr int kRows = 2, kColumns = 4;
  static constexpr int64_t kPackFrom = INT64_MAX;

  BNBOPS_HD static int32_t reduce(__m256i x) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
  }

  template <int kTileRows>
  static void tile(const Activation* a, int64_t stride, const int32_t* /*activation_sums*/,
                   const int8_t* const (&w)[kColumns], int64_t inner, int32_t* sums, int64_t sums_stride) {
    __m256i sum[kTileRows * kColumns];
    unrolled<kTileRows * kColumns>([&](auto i) { sum[i] = _mm256_setzero_si256(); });
    const auto step = [&](const int8_t* const(&from)[kColumns], int64_t at, int64_t k) BNBOPS_INLINE_LAMBDA {
      __m256i activation[kTileRows];
      unrolled<kTileRows>(
          [&](auto r) { activation[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + r * stride + k)); });
      unrolled<kColumns>([&](auto c) {
        const __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[c] + at)));
        unrolled<kTileRows>([&](auto r) {
          constexpr int kAt = r * kColumns + c;
          sum[kAt] = _mm256_add_epi32(sum[kAt], _mm256_madd_epi16(weight, activation[r]));
        });
      });
    };
    int64_t k = 0;
    for (; k + 16 <= inner; k += 16) step(w, k, k);
    if (k < inner) {
      int8_t padded[kColumns][16] = {};
      const int8_t* rest[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        memcpy(padded[c], w[c] + k, inner - k);
        rest[c] = padded[c];
      }
      step(rest, 0, k);
    }
    unrolled<kTileRows * kColumns>([&](auto i) { sums[i / kColumns * sums_stride + i % kColumns] = reduce(sum[i]); });
  }
};

BNBOPS_NAMESPACE_END
