// 4-bit weights to bfloat16, 32 at a time (AVX-512 with VBMI and BF16).
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/weight_4bit_kernels.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::TileJob;

using cpu::kChunk32;

// A chunk comes in interleaved order: four of its first 16 elements, four of its last 16, the next four of its first...
inline __m512i interleaved(__m512i chunk) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), chunk);
}

class TileDecoder {
 public:
  explicit TileDecoder(const Weight4bit& weight)
      : weight_(weight),
        log2_blocksize_(__builtin_ctzll(weight.blocksize)),
        values_(_mm512_loadu_ps(kFormats4bit[weight.format].values)) {
    alignas(64) uint16_t shifts[32];  // qwords 2i and 2i + 1 take their four codes from bit 16i on
    for (int word = 0; word < 32; ++word) {
      const int shift = nibble_shift(kFormats4bit[weight.format].nibbles, word % 4);
      shifts[word] = static_cast<uint16_t>(16 * (word / 8) + shift);
    }
    shifts_ = _mm512_load_si512(shifts);
  }

  // The 16 values of an element's block, twice: an index then needs no masking, since only its lowest 5 bits count.
  __m512i table_at(int64_t element) const { return table_of(weight_.scales.absmax[element >> log2_blocksize_]); }
  bool begins_block(int64_t element) const { return (element & (weight_.blocksize - 1)) == 0; }

  // The chunk that begins at an element.
  __m512i decode(int64_t element, __m512i table) const { return decode_codes(weight_.codes + element / 2, table); }

  void prefetch(int64_t element) const { _mm_prefetch(weight_.codes + element / 2, _MM_HINT_T0); }

  // Calls visit(i, chunk) for the chunks of elements [first, first + n), which are whole blocks or lie in one.
  template <class Visit>
  void for_chunks_of(int64_t first, int64_t n, const Visit& visit) const {
    const uint8_t* codes = weight_.codes + first / 2;
    const float* absmax = weight_.scales.absmax + (first >> log2_blocksize_);
    const int64_t chunks = n / kChunk32, run = std::min(n, weight_.blocksize) / kChunk32;
    for (int64_t block = 0; block < chunks; block += run) {
      const __m512i table = table_of(*absmax++);
      for (int64_t i = block; i < block + run; ++i, codes += kChunk32 / 2) visit(i, decode_codes(codes, table));
    }
  }

 private:
  __m512i table_of(float absmax) const {
    const __m512 scaled = _mm512_mul_ps(values_, _mm512_set1_ps(absmax));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
  }

  __m512i decode_codes(const uint8_t* chunk, __m512i table) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts_, _mm512_broadcast_i32x4(codes)), table);
  }

  const Weight4bit& weight_;
  int log2_blocksize_;
  __m512 values_;
  __m512i shifts_;
};

BNBOPS_NAMESPACE_END
