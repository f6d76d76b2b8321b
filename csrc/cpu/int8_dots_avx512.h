// Sums of products of int8 by AVX-512 VNNI. Its instruction multiplies unsigned by signed bytes, so weights are shifted
// by 128 (one bit flipped), which adds 128 times the sum of the activations; sums wrap, and the difference is exact.
#pragma once

#include <immintrin.h>

#include "cpu/int8_pack_avx512.h"

BNBOPS_NAMESPACE_BEGIN

struct Avx512Dots {
  using Activation = int8_t;
  static constexpr int64_t kRowBlock = 256;
  static constexpr int kRows = 4, kColumns = 4;

  // What undoes the shift.
  BNBOPS_HD static int32_t initial_sum(int32_t activation_sum) {
    return static_cast<int32_t>(0U - 128U * static_cast<uint32_t>(activation_sum));
  }

  template <int kTileRows>
  static void tile(const Activation* a, int64_t stride, const int32_t* activation_sums,
                   const int8_t* const (&w)[kColumns], int64_t inner, int32_t* sums, int64_t sums_stride) {
    __m512i sum[kTileRows * kColumns];
    unrolled<kTileRows * kColumns>([&](auto i) { sum[i] = _mm512_setzero_si512(); });
    const auto step = [&](int64_t k, __mmask64 there) BNBOPS_INLINE_LAMBDA {
      __m512i activation[kTileRows];
      unrolled<kTileRows>([&](auto r) { activation[r] = _mm512_loadu_si512(a + r * stride + k); });
      unrolled<kColumns>([&](auto c) {
        const __m512i weight = _mm512_maskz_loadu_epi8(there, w[c] + k);
        const __m512i shifted = _mm512_xor_si512(weight, _mm512_set1_epi8(-128));
        unrolled<kTileRows>([&](auto r) {
          constexpr int kAt = r * kColumns + c;
          sum[kAt] = _mm512_dpbusd_epi32(sum[kAt], shifted, activation[r]);
        });
      });
    };
    int64_t k = 0;
    for (; k + 64 <= inner; k += 64) step(k, ~0ULL);
    if (k < inner) step(k, (1ULL << (inner - k)) - 1);
    unrolled<kTileRows * kColumns>([&](auto i) {
      const auto shifted = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum[i]));
      const auto corrected = shifted + static_cast<uint32_t>(initial_sum(activation_sums[i / kColumns]));
      sums[i / kColumns * sums_stride + i % kColumns] = static_cast<int32_t>(corrected);
    });
  }

  // ---- many rows: a panel of weights is packed once, and its columns are then the lanes of a vector ---------------

  static constexpr int64_t kPackFrom = 5;  // rows worth packing for
  static constexpr int64_t kDepth = 512;   // products at a time: the packed panel stays in the first-level cache
  static constexpr int kPackedRows = 6;    // of a tile: 24 sums, 4 weights and an activation fill the registers
  static constexpr uint8_t kShift = 0x80;

  // Adds products of kTileRows rows and a packed panel to sums [kTileRows][64].
  template <int kTileRows>
  static void packed_tile(const Activation* a, int64_t stride, const int8_t* packed, int64_t depth, int32_t* sums) {
    __m512i sum[4 * kTileRows];
    unrolled<4 * kTileRows>([&](auto i) { sum[i] = _mm512_loadu_si512(sums + 16 * i); });
    for (int64_t k = 0; k < depth; k += 4) {
      __m512i weight[4];
      unrolled<4>([&](auto g) { weight[g] = _mm512_load_si512(packed + 16 * (g * depth + k)); });
      unrolled<kTileRows>([&](auto r) {
        int32_t four;
        memcpy(&four, a + r * stride + k, sizeof(four));
        const __m512i activation = _mm512_set1_epi32(four);
        unrolled<4>([&](auto g) { sum[4 * r + g] = _mm512_dpbusd_epi32(sum[4 * r + g], weight[g], activation); });
      });
    }
    unrolled<4 * kTileRows>([&](auto i) { _mm512_storeu_si512(sums + 16 * i, sum[i]); });
  }

  static void packed_rows(const Activation* a, int64_t stride, int64_t rows, const int8_t* packed, int64_t depth,
                          int32_t* sums) {
    for (; rows >= kPackedRows; rows -= kPackedRows, a += kPackedRows * stride, sums += 64 * kPackedRows) {
      packed_tile<kPackedRows>(a, stride, packed, depth, sums);
    }
    switch (rows) {
      case 5: return packed_tile<5>(a, stride, packed, depth, sums);
      case 4: return packed_tile<4>(a, stride, packed, depth, sums);
      case 3: return packed_tile<3>(a, stride, packed, depth, sums);
      case 2: return packed_tile<2>(a, stride, packed, depth, sums);
      case 1: return packed_tile<1>(a, stride, packed, depth, sums);
      default: return;
    }
  }
};

BNBOPS_NAMESPACE_END
