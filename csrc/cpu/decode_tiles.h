// 4-bit weights to bfloat16, 32 at a time (AVX-512 with VBMI and BF16).
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "cpu/tile_kernels.h"
#include "cpu/weight_4bit_kernels.h"

BNBOPS_NAMESPACE_BEGIN

using cpu::TileJob;

constexpr int64_t kChunk32 = 32;  // elements decoded at a time; a multiple of it makes a block
constexpr int64_t kScales = 64;   // decoded at a time

// A chunk comes in interleaved order: four of its first 16 elements, four of its last 16, the next four of its first...
inline __m512i interleaved(__m512i chunk) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), chunk);
}

class TileDecoder {
 public:
  explicit TileDecoder(const Weight4bit& weight) : weight_(weight), values_(_mm512_loadu_ps(weight.codebook)) {
    alignas(64) uint16_t shifts[32];  // qwords 2i and 2i + 1 take their four codes from bit 16i on
    for (int word = 0; word < 32; ++word) shifts[word] = static_cast<uint16_t>(16 * (word / 8) + 4 * ((word % 4) ^ 1));
    shifts_ = _mm512_load_si512(shifts);
  }

  // The 16 values of a block, twice: an index then needs no masking, since only its lowest 5 bits count.
  __m512i table(float scale) const {
    const __m512 scaled = _mm512_mul_ps(values_, _mm512_set1_ps(scale));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
  }

  // The chunk that begins at an element.
  __m512i decode(int64_t element, __m512i table) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight_.codes + element / 2));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts_, _mm512_broadcast_i32x4(codes)), table);
  }

  void prefetch(int64_t element) const { _mm_prefetch(weight_.codes + element / 2, _MM_HINT_T0); }

  // Scales of the blocks [first, first + n), n <= kScales: where they are, or decoded into `scratch`.
  const float* scales(int64_t first, int64_t n, float* scratch) const {
    if (weight_.absmax != nullptr) return weight_.absmax + first;
    const __m512 offset = _mm512_set1_ps(weight_.nested_offset);
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t block = first + i, last = first + std::min(n, i + 16) - 1;
      if (block / weight_.nested_blocksize != last / weight_.nested_blocksize) {
        for (int64_t b = block; b <= last; ++b) scratch[b - first] = scale_of_block(weight_, b);
        continue;
      }
      const __mmask16 some = static_cast<__mmask16>((1U << (last - block + 1)) - 1);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, weight_.nested_codes + block));
      const __m512 entry = _mm512_i32gather_ps(code, weight_.nested_codebook, 4);
      const __m512 absmax = _mm512_set1_ps(weight_.nested_absmax[block / weight_.nested_blocksize]);
      _mm512_mask_storeu_ps(scratch + i, some, _mm512_add_ps(_mm512_mul_ps(entry, absmax), offset));
    }
    return scratch;
  }

  // Calls visit(element, table) for each chunk of [first, first + n); `first` begins a chunk, n is a multiple of 32.
  template <class Visit>
  void for_chunks_of(int64_t first, int64_t n, const Visit& visit) const {
    alignas(64) float scratch[kScales];
    const int64_t size = weight_.blocksize, end = first + n, last_block = (end - 1) / size;
    int64_t element = first;
    for (int64_t block = first / size; block <= last_block; block += kScales) {
      const int64_t blocks = std::min(kScales, last_block + 1 - block);
      const float* scale = scales(block, blocks, scratch);
      for (int64_t b = 0; b < blocks; ++b) {
        const __m512i values = table(scale[b]);
        for (const int64_t stop = std::min(end, (block + b + 1) * size); element < stop; element += kChunk32) {
          visit(element, values);
        }
      }
    }
  }

 private:
  const Weight4bit& weight_;
  __m512 values_;
  __m512i shifts_;
};

BNBOPS_NAMESPACE_END
