// Sums of products of int8 by AVX-512 VNNI. Its instruction multiplies unsigned by signed bytes, so weights are shifted
// by 128 (one bit flipped), which adds 128 times the sum of the activations; sums wrap, and the difference is exact.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "cpu/transpose_avx512.h"

BNBOPS_NAMESPACE_BEGIN

// Weights in the order in which AVX-512 and AMX multiply them: for four k at a time, sixteen columns side by side,
// packed[group of 16 columns][k / 4][column][k % 4], of `width` columns (rows of the weight, `inner` apart), `depth` of
// their elements each, padded with zeros to a multiple of 64. Every byte is XORed with `flip`. Beyond `width`: the last
// column again.
inline void pack_weights(const int8_t* weight, int64_t inner, int64_t width, int64_t depth, uint8_t flip,
                         int8_t* packed) {
  const int64_t padded = (depth + 63) / 64 * 64;
  for (int64_t group = 0; group < 4; ++group) {
    const int8_t* from[16];
    for (int64_t c = 0; c < 16; ++c) from[c] = weight + std::min(16 * group + c, width - 1) * inner;
    for (int64_t k = 0; k < depth; k += 64) {
      const __mmask64 there = depth - k >= 64 ? ~0ULL : (1ULL << (depth - k)) - 1;
      __m512i v[16];
      unrolled<16>([&](auto c) { v[c] = _mm512_maskz_loadu_epi8(there, from[c] + k); });
      transpose_dwords(v);
      int8_t* to = packed + 16 * (group * padded + k);
      unrolled<16>([&](auto i) {
        _mm512_store_si512(to + 64 * i, _mm512_xor_si512(v[i], _mm512_set1_epi8(static_cast<char>(flip))));
      });
    }
  }
}

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
