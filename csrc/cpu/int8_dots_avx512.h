// Sums of products of int8 by AVX-512 VNNI. Its instruction multiplies unsigned by signed bytes, so weights are shifted
// by 128 (one bit flipped), which adds 128 times the sum of the activations; sums wrap, and the difference is exact.
#pragma once

#include <immintrin.h>

#include "portable.h"

BNBOPS_NAMESPACE_BEGIN

struct Avx512Dots {
  using Activation = int8_t;
  static constexpr int64_t kRowBlock = 256;
  static constexpr int kRows = 4, kColumns = 4;

  template <int kTileRows>
  static void tile(const Activation* a, int64_t stride, const int32_t* activation_sums,
                   const int8_t* const (&w)[kColumns], int64_t inner, int32_t* sums, int64_t sums_stride) {
    __m512i sum[kTileRows][kColumns];
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_setzero_si512();
    }
    const auto step = [&](int64_t k, const auto& load) {
      __m512i activation[kTileRows];
      for (int r = 0; r < kTileRows; ++r) activation[r] = _mm512_loadu_si512(a + r * stride + k);
      for (int c = 0; c < kColumns; ++c) {
        const __m512i weight = _mm512_xor_si512(load(w[c] + k), _mm512_set1_epi8(-128));
        for (int r = 0; r < kTileRows; ++r) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], weight, activation[r]);
      }
    };
    int64_t k = 0;
    for (; k + 64 <= inner; k += 64) step(k, [](const int8_t* from) { return _mm512_loadu_si512(from); });
    if (k < inner) {
      const __mmask64 rest = (1ULL << (inner - k)) - 1;
      step(k, [rest](const int8_t* from) { return _mm512_maskz_loadu_epi8(rest, from); });
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        const auto shifted = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum[r][c]));
        sums[r * sums_stride + c] = static_cast<int32_t>(shifted - 128U * static_cast<uint32_t>(activation_sums[r]));
      }
    }
  }
};

BNBOPS_NAMESPACE_END
