// Weights in the order in which AVX-512 and AMX multiply them: for four k at a time, sixteen columns side by side.
#pragma once

#include <algorithm>

#include "cpu/transpose_avx512.h"

BNBOPS_NAMESPACE_BEGIN

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

BNBOPS_NAMESPACE_END
