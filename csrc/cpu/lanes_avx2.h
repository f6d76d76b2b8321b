// Eight lanes of AVX2 + FMA + F16C. Each operation means what its namesake in ../lanes_scalar.h means.
#pragma once

#include <immintrin.h>

#include "core/lines.h"
#include "core/nibbles.h"

BNBOPS_NAMESPACE_BEGIN

// What rules compute with: the operations that portable.h has for a float.
struct Avx2Number {
  __m256 v;
  BNBOPS_HD Avx2Number() = default;
  BNBOPS_HD Avx2Number(__m256 vector) : v(vector) {}
  BNBOPS_HD explicit Avx2Number(float x) : v(_mm256_set1_ps(x)) {}
};
BNBOPS_HD Avx2Number operator*(Avx2Number a, Avx2Number b) { return _mm256_mul_ps(a.v, b.v); }
BNBOPS_HD Avx2Number operator+(Avx2Number a, Avx2Number b) { return _mm256_add_ps(a.v, b.v); }
BNBOPS_HD Avx2Number fused_multiply_add(Avx2Number a, Avx2Number b, Avx2Number c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
BNBOPS_HD Avx2Number square_root(Avx2Number x) { return _mm256_sqrt_ps(x.v); }
BNBOPS_HD __m256 is_finite(Avx2Number x) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(0x7F800000), magnitude));
}
BNBOPS_HD __m256 is_number(Avx2Number x) { return _mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q); }
BNBOPS_HD Avx2Number divide_by_positive(Avx2Number a, Avx2Number b) {
  return _mm256_and_ps(_mm256_cmp_ps(b.v, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_div_ps(a.v, b.v));
}
BNBOPS_HD Avx2Number sign_of(Avx2Number x) {
  const __m256 one = _mm256_set1_ps(1.0F), zero = _mm256_setzero_ps();
  const __m256 positive = _mm256_and_ps(_mm256_cmp_ps(x.v, zero, _CMP_GT_OQ), one);
  return _mm256_sub_ps(positive, _mm256_and_ps(_mm256_cmp_ps(x.v, zero, _CMP_LT_OQ), one));
}
BNBOPS_HD Avx2Number select(__m256 condition, Avx2Number a, Avx2Number b) {
  return _mm256_blendv_ps(b.v, a.v, condition);
}

struct Avx2Lanes {
  static constexpr int kWidth = 8;
  using Float = __m256;
  using Int = __m256i;
  using Number = Avx2Number;

  struct Table32 {
    const float* values;
    BNBOPS_HD explicit Table32(const uint32_t* table) : values(reinterpret_cast<const float*>(table)) {}
    BNBOPS_HD Float operator[](Int i) const { return gather(values, _mm256_and_si256(i, splat_int(31))); }
  };
  // vpermps takes the low 3 bits of an index.
  struct Place {
    Float value, offset;
  };
  struct Pieces {
    Float next, slope, offset;  // by line; where the next one begins
    Int first;
    BNBOPS_HD explicit Pieces(const PieceLines& lines)
        : next(_mm256_loadu_ps(reinterpret_cast<const float*>(lines.begin + 1))),
          slope(of_last_8(lines.slope)),
          offset(of_last_8(lines.offset)),
          first(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lines.first)))) {}
    BNBOPS_HD Place operator()(Float x) const {
      const Float a = _mm256_max_ps(x, _mm256_castsi256_ps(splat_int(kTwoToMinus22)));
      const Int below = _mm256_shuffle_epi8(first, shift_right<24>(as_int(a)));
      const Float passed = _mm256_cmp_ps(a, _mm256_permutevar8x32_ps(next, below), _CMP_GE_OQ);
      const Int line = _mm256_sub_epi32(below, as_int(passed));
      const Float start = _mm256_permutevar8x32_ps(offset, line);
      return {fma(a, _mm256_permutevar8x32_ps(slope, line), start), start};
    }

   private:
    BNBOPS_HD static Float of_last_8(const float (&x)[kPieces]) {  // of line 8 first
      return _mm256_setr_ps(x[8], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
    }
  };
  // The lowest bits of the exponent are 7 where e is 0. That is also line 8 of a map without signs, where the only
  // other number is 1: its line passes 0 there and is far above all at 256.
  template <bool kSigned>
  struct Octaves {
    Float slope, base, largest;
    BNBOPS_HD explicit Octaves(const OctaveLines& lines)
        : slope(rotated(lines.slope, kSigned ? lines.slope[0] : 1)),
          base(rotated(lines.base, kSigned ? lines.base[0] : -1)),
          largest(_mm256_set1_ps(lines.base[8])) {}
    BNBOPS_HD static const uint8_t* open(const uint8_t* codes) { return codes; }
    BNBOPS_HD Float operator()(const uint8_t* codes, int v) const {
      const Int bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * v)));
      const Float n = _mm256_cvtepi32_ps(add(bytes, kSigned ? -127 : 1));
      const Int octave = shift_right<23>(as_int(n));
      const Float by = _mm256_permutevar8x32_ps(slope, octave), from = _mm256_permutevar8x32_ps(base, octave);
      if constexpr (!kSigned) return _mm256_min_ps(fma(n, by, from), largest);
      const Float value = fma(n, by, _mm256_xor_ps(from, _mm256_and_ps(n, splat(-0.0F))));
      return _mm256_and_ps(value, _mm256_cmp_ps(n, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    }

   private:
    BNBOPS_HD static Float rotated(const float (&x)[kOctaveLines], float seventh) {
      return _mm256_setr_ps(x[1], x[2], x[3], x[4], x[5], x[6], x[7], seventh);
    }
  };

  // As 16-bit floats: the exponent's bias is larger there, by 8.
  BNBOPS_HD static const uint8_t* open_float8(const uint8_t* codes) { return codes; }
  BNBOPS_HD static Float float8(const uint8_t* codes, int v) {
    const __m128i words = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * v)));
    const __m128i shifted = _mm_srai_epi16(_mm_slli_epi16(words, 8), 1);  // the sign twice
    return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(static_cast<short>(0xBFFF))));
  }

  BNBOPS_HD static Float splat(float x) { return _mm256_set1_ps(x); }
  BNBOPS_HD static Int splat_int(int x) { return _mm256_set1_epi32(x); }
  BNBOPS_HD static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  BNBOPS_HD static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  BNBOPS_HD static Float nan() { return _mm256_castsi256_ps(splat_int(kNanBits)); }
  BNBOPS_HD static Float is_nan(Float x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  BNBOPS_HD static Float with_one_nan(Float x) { return _mm256_blendv_ps(x, nan(), is_nan(x)); }
  BNBOPS_HD static Float abs(Float x) { return _mm256_andnot_ps(splat(-0.0F), x); }
  BNBOPS_HD static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  BNBOPS_HD static Float select_if_less(Float a, Float b, Float x, Float y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  BNBOPS_HD static Int add(Int i, int x) { return _mm256_add_epi32(i, splat_int(x)); }
  BNBOPS_HD static Int max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  BNBOPS_HD static Int as_int(Float x) { return _mm256_castps_si256(x); }
  template <int kBits>
  BNBOPS_HD static Int shift_right(Int i) {
    return _mm256_srli_epi32(i, kBits);
  }
  BNBOPS_HD static Int add_if_less(Int i, int step, Float a, Float b) {
    return _mm256_add_epi32(i, _mm256_and_si256(as_int(_mm256_cmp_ps(a, b, _CMP_LT_OQ)), splat_int(step)));
  }
  BNBOPS_HD static Float gather(const float* table, Int i) { return _mm256_i32gather_ps(table, i, 4); }
  BNBOPS_HD static Int gather(const uint8_t* table, Int i) {
    return _mm256_and_si256(_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), i, 1), splat_int(0xFF));
  }
  BNBOPS_HD static Int round(Float x) { return _mm256_cvtps_epi32(x); }
  BNBOPS_HD static Int round_against_sign(Float x, Float sign) {
    return round(_mm256_or_ps(x, _mm256_andnot_ps(sign, splat(-0.0F))));
  }
  BNBOPS_HD static Int round_if_less(Float a, Float b, Float x) {
    return round(_mm256_and_ps(x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }
  BNBOPS_HD static bool all_finite(Float x) {
    const Float zero = _mm256_setzero_ps();
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_sub_ps(x, x), zero, _CMP_NEQ_UQ)) == 0;
  }
  template <bool kSigned>
  BNBOPS_HD static Float larger(Float m, Float x) {
    return _mm256_max_ps(kSigned ? abs(x) : x, m);
  }

  // Packing works within 128-bit halves: quarter r of half j comes out at dword 4 * j + r and belongs at 2 * r + j.
  BNBOPS_HD static Int in_order(Int packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  BNBOPS_HD static void store_signed(const Int (&k)[4], uint8_t* codes) {
    const Int bytes = _mm256_packs_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
    _mm256_storeu_si256(reinterpret_cast<Int*>(codes), in_order(_mm256_xor_si256(bytes, _mm256_set1_epi8(127))));
  }
  BNBOPS_HD static void store_codes(const Int (&k)[4], uint8_t* codes) {
    const Int bytes = _mm256_packus_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
    _mm256_storeu_si256(reinterpret_cast<Int*>(codes), in_order(bytes));
  }
  BNBOPS_HD static void store_nibbles(const Int (&k)[4], Nibbles nibbles, uint8_t* bytes) {
    const Int codes = _mm256_packus_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
    const short factors = nibbles == Nibbles::kHighFirst ? 0x0110 : 0x1001;  // 16 * first + second, or the reverse
    const Int pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(factors));
    const Int halves = _mm256_packus_epi16(pairs, pairs);
    const __m128i first = _mm256_castsi256_si128(halves), second = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_unpacklo_epi16(first, second));
  }

  BNBOPS_HD static void copy(void* to, const void* from, int64_t bytes) { memcpy(to, from, bytes); }

  struct Codebook {
    static constexpr int kPerByte = 1;
    const float* values;
    explicit Codebook(const float* table) : values(table) {}
    BNBOPS_HD void decode(const uint8_t* codes, float scale, Float (&out)[4]) const {
      for (int i = 0; i < 4; ++i) {
        const Int index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
        out[i] = mul(gather(values, index), splat(scale));
      }
    }
  };

  // A lookup in 8 entries takes the low 3 bits of an index; the fourth chooses between two.
  struct Codebook4bit {
    static constexpr int kPerByte = 2;
    Float low, high;
    Int shifts;  // of element i in lane i
    Codebook4bit(const float* table, Nibbles nibbles)
        : low(load(table)),
          high(load(table + 8)),
          shifts(
              _mm256_xor_si256(_mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), splat_int(nibble_shift(nibbles, 0)))) {}
    BNBOPS_HD Float lookup(Int codes) const {
      const Float fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), fourth_bit);
    }
    BNBOPS_HD void decode(const uint8_t* source, float scale, Float (&out)[4]) const {
      for (int v = 0; v < 4; ++v) {
        int32_t codes;
        memcpy(&codes, source + 4 * v, sizeof(codes));
        const Int index = _mm256_srlv_epi32(splat_int(codes), shifts);
        const Float fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const Float value =
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), fourth_bit);
        out[v] = mul(value, splat(scale));
      }
    }
  };

  struct HalfCodebook4bit {
    __m128i low, high;  // bytes of the values
    Nibbles nibbles;
    HalfCodebook4bit(const uint16_t* table, Nibbles order) : nibbles(order) {
      const auto* words = reinterpret_cast<const __m128i*>(table);
      const __m128i first = _mm_loadu_si128(words), second = _mm_loadu_si128(words + 1), byte = _mm_set1_epi16(0xFF);
      low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
      high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    }
    BNBOPS_HD Int decode(const uint8_t* source) const {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
      const __m128i upper = _mm_srli_epi16(codes, 4);
      const __m128i pairs =
          nibbles == Nibbles::kHighFirst ? _mm_unpacklo_epi8(upper, codes) : _mm_unpacklo_epi8(codes, upper);
      const __m128i index = _mm_and_si128(pairs, _mm_set1_epi8(15));
      const __m128i lows = _mm_shuffle_epi8(low, index), highs = _mm_shuffle_epi8(high, index);
      return _mm256_set_m128i(_mm_unpackhi_epi8(lows, highs), _mm_unpacklo_epi8(lows, highs));
    }
  };

  struct Spread {
    Int index;
    BNBOPS_HD explicit Spread(int dwords)
        : index(_mm256_srlv_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), splat_int(__builtin_ctz(dwords)))) {}
    BNBOPS_HD Float operator()(const float* scales) const { return _mm256_permutevar8x32_ps(load(scales), index); }
  };

  BNBOPS_HD static Float load(const float* x) { return _mm256_loadu_ps(x); }
  BNBOPS_HD static Int load_int(const uint8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const Int*>(bytes));
  }
  BNBOPS_HD static void store(float* out, Float x) { _mm256_storeu_ps(out, x); }
  BNBOPS_HD static void store_int(uint8_t* out, Int x) { _mm256_storeu_si256(reinterpret_cast<Int*>(out), x); }
  BNBOPS_HD static int32_t reduce_max(Int x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  BNBOPS_HD static float reduce_add(Float x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  BNBOPS_HD static Float load_bfloat16(const uint16_t* x) {
    const Int wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  BNBOPS_HD static void store_bfloat16(uint16_t* out, Float x) {
    const Int bits = as_int(x), top = _mm256_srli_epi32(bits, 16);
    const Int bias = _mm256_add_epi32(_mm256_and_si256(top, splat_int(1)), splat_int(0x7FFF));
    const Int rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const Int result = _mm256_blendv_epi8(rounded, splat_int(kNanHalfBits), as_int(is_nan(x)));
    const Int words = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(words));
  }
  BNBOPS_HD static Float load_float16(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  BNBOPS_HD static void store_float16(uint16_t* out, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(with_one_nan(x), _MM_FROUND_TO_NEAREST_INT));
  }

  static constexpr bool kPairs = false;
  using Paired = Avx2Lanes;

  struct PastCaches;
};

struct Avx2Lanes::PastCaches : Avx2Lanes {
  BNBOPS_HD static void store(float* out, Float x) { _mm256_stream_ps(out, x); }
  BNBOPS_HD static void store_int(uint8_t* out, Int x) { _mm256_stream_si256(reinterpret_cast<Int*>(out), x); }
  static void fence() { _mm_sfence(); }
};

BNBOPS_NAMESPACE_END
