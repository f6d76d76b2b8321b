// Sixteen lanes of AVX-512 (F, BW, DQ, VL, VBMI). Each operation means what its namesake in ../lanes_scalar.h means.
#pragma once

#include <immintrin.h>

#include "core/lines.h"
#include "core/nibbles.h"

BNBOPS_NAMESPACE_BEGIN

// What rules compute with: the operations that portable.h has for a float.
struct Avx512Number {
  __m512 v;
  BNBOPS_HD Avx512Number() = default;
  BNBOPS_HD Avx512Number(__m512 vector) : v(vector) {}
  BNBOPS_HD explicit Avx512Number(float x) : v(_mm512_set1_ps(x)) {}
};
BNBOPS_HD Avx512Number operator*(Avx512Number a, Avx512Number b) { return _mm512_mul_ps(a.v, b.v); }
BNBOPS_HD Avx512Number operator+(Avx512Number a, Avx512Number b) { return _mm512_add_ps(a.v, b.v); }
BNBOPS_HD Avx512Number fused_multiply_add(Avx512Number a, Avx512Number b, Avx512Number c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
BNBOPS_HD Avx512Number square_root(Avx512Number x) { return _mm512_sqrt_ps(x.v); }
constexpr int kNanOrInfinity = 0x99;  // what vfpclassps calls them
BNBOPS_HD __mmask16 is_finite(Avx512Number x) { return _knot_mask16(_mm512_fpclass_ps_mask(x.v, kNanOrInfinity)); }
BNBOPS_HD __mmask16 is_number(Avx512Number x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q); }
BNBOPS_HD Avx512Number divide_by_positive(Avx512Number a, Avx512Number b) {
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v, b.v);
}
BNBOPS_HD Avx512Number sign_of(Avx512Number x) {
  const __m512 one = _mm512_set1_ps(1.0F), zero = _mm512_setzero_ps();
  const __m512 positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, zero, _CMP_GT_OQ), one);
  return _mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(x.v, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.0F));
}
BNBOPS_HD Avx512Number select(__mmask16 condition, Avx512Number a, Avx512Number b) {
  return _mm512_mask_blend_ps(condition, b.v, a.v);
}

struct Avx512Lanes {
  static constexpr int kWidth = 16;
  using Float = __m512;
  using Int = __m512i;
  using Number = Avx512Number;

  struct Table32 {  // in two registers: vpermi2ps takes the low 5 bits of an index
    __m512 low, high;
    BNBOPS_HD explicit Table32(const uint32_t* table)
        : low(_mm512_loadu_ps(table)), high(_mm512_loadu_ps(table + 16)) {}
    BNBOPS_HD Float operator[](Int i) const { return _mm512_permutex2var_ps(low, i, high); }
  };
  struct Place {
    Float value, offset;
  };
  struct Pieces {  // carries in two registers: vpermi2d takes the low 5 bits of an index, vpermps the low 4
    Int low, high;
    Float slope, offset;
    BNBOPS_HD explicit Pieces(const PieceLines& lines)
        : low(_mm512_loadu_si512(lines.carry)),
          high(_mm512_loadu_si512(lines.carry + 16)),
          slope(_mm512_maskz_loadu_ps((1 << kPieces) - 1, lines.slope)),
          offset(_mm512_maskz_loadu_ps((1 << kPieces) - 1, lines.offset)) {}
    BNBOPS_HD Place operator()(Float a) const {
      const Int carry = _mm512_permutex2var_epi32(low, shift_right<23>(as_int(a)), high);
      const Int line = shift_right<23>(_mm512_add_epi32(as_int(a), carry));
      const Float start = _mm512_permutexvar_ps(line, offset);
      return {fma(a, _mm512_permutexvar_ps(line, slope), start), start};
    }
  };
  template <bool kSigned>
  struct Octaves;

  // As 16-bit floats: the exponent's bias is larger there, by 8.
  struct Float8 {
    Int halves[2];
  };
  BNBOPS_HD static Float8 open_float8(const uint8_t* codes) { return open_float8(_mm512_loadu_si512(codes)); }
  BNBOPS_HD static Float8 open_float8(Int codes) {
    Float8 opened;
    for (int i = 0; i < 2; ++i) {
      const Int words =
          _mm512_cvtepu8_epi16(i == 0 ? _mm512_castsi512_si256(codes) : _mm512_extracti64x4_epi64(codes, 1));
      const Int shifted = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 1);  // the sign twice
      opened.halves[i] = _mm512_and_si512(shifted, _mm512_set1_epi16(static_cast<short>(0xBFFF)));
    }
    return opened;
  }
  BNBOPS_HD static Float float8(const Float8& codes, int v) {
    const Int pair = codes.halves[v / 2];
    return _mm512_cvtph_ps(v % 2 == 0 ? _mm512_castsi512_si256(pair) : _mm512_extracti64x4_epi64(pair, 1));
  }

  BNBOPS_HD static Float splat(float x) { return _mm512_set1_ps(x); }
  BNBOPS_HD static Int splat_int(int x) { return _mm512_set1_epi32(x); }
  BNBOPS_HD static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  BNBOPS_HD static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  BNBOPS_HD static __mmask16 is_nan(Float x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  BNBOPS_HD static Float with_one_nan(Float x) {
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(as_int(x), is_nan(x), splat_int(kNanBits)));
  }
  BNBOPS_HD static Float abs(Float x) { return _mm512_abs_ps(x); }
  BNBOPS_HD static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  BNBOPS_HD static Float select_if_less(Float a, Float b, Float x, Float y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  BNBOPS_HD static Int add(Int i, int x) { return _mm512_add_epi32(i, splat_int(x)); }
  BNBOPS_HD static Int max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  BNBOPS_HD static Int as_int(Float x) { return _mm512_castps_si512(x); }
  template <int kBits>
  BNBOPS_HD static Int shift_right(Int i) {
    return _mm512_srli_epi32(i, kBits);
  }
  BNBOPS_HD static Int add_if_less(Int i, int step, Float a, Float b) {
    return _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), i, splat_int(step));
  }
  BNBOPS_HD static Float gather(const float* table, Int i) { return _mm512_i32gather_ps(i, table, 4); }
  BNBOPS_HD static Int gather(const uint8_t* table, Int i) {
    return _mm512_and_si512(_mm512_i32gather_epi32(i, table, 1), splat_int(0xFF));
  }
  BNBOPS_HD static Int round(Float x) { return _mm512_cvtps_epi32(x); }
  BNBOPS_HD static Int round_against_sign(Float x, Float sign) {
    constexpr int kSelect = 0x74;  // the opposite of the bit of `sign` where the mask is set, the bit of x elsewhere
    return round(
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32(as_int(x), splat_int(INT32_MIN), as_int(sign), kSelect)));
  }
  BNBOPS_HD static Int round_if_less(Float a, Float b, Float x) {
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
  }
  BNBOPS_HD static bool all_finite(Float x) { return _mm512_fpclass_ps_mask(x, kNanOrInfinity) == 0; }
  template <bool kSigned>
  BNBOPS_HD static Float larger(Float m, Float x) {
    return kSigned ? _mm512_range_ps(m, x, 0xB) : _mm512_max_ps(x, m);  // of magnitudes, the larger one
  }

  // Packing and unpacking work within 128-bit quarters: dword 4 * j + r of one order is dword 4 * r + j of the other.
  BNBOPS_HD static Int transposed(Int dwords) {
    const Int index = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(index, dwords);
  }
  BNBOPS_HD static Int packed_signed(const Int (&k)[4]) {
    const Int bytes = _mm512_packs_epi16(_mm512_packs_epi32(k[0], k[1]), _mm512_packs_epi32(k[2], k[3]));
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(127));
  }
  BNBOPS_HD static Int packed_codes(const Int (&k)[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(k[0], k[1]), _mm512_packs_epi32(k[2], k[3]));
  }
  BNBOPS_HD static void store_signed(const Int (&k)[4], uint8_t* codes) {
    _mm512_storeu_si512(codes, transposed(packed_signed(k)));
  }
  BNBOPS_HD static void store_codes(const Int (&k)[4], uint8_t* codes) {
    _mm512_storeu_si512(codes, transposed(packed_codes(k)));
  }
  BNBOPS_HD static void store_nibbles(const Int (&k)[4], Nibbles nibbles, uint8_t* bytes) {
    const Int codes = _mm512_packus_epi16(_mm512_packs_epi32(k[0], k[1]), _mm512_packs_epi32(k[2], k[3]));
    const short factors = nibbles == Nibbles::kHighFirst ? 0x0110 : 0x1001;  // 16 * first + second, or the reverse
    const Int pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(factors));
    const __m256i order = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // transposed()
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes),
                        _mm256_permutexvar_epi16(order, _mm512_cvtepi16_epi8(pairs)));
  }

  BNBOPS_HD static void copy(void* to, const void* from, int64_t bytes) {
    auto* target = static_cast<uint8_t*>(to);
    const auto* source = static_cast<const uint8_t*>(from);
    for (; bytes > 0; bytes -= 64, target += 64, source += 64) {
      const __mmask64 rest = bytes >= 64 ? ~0ULL : (1ULL << bytes) - 1;
      _mm512_mask_storeu_epi8(target, rest, _mm512_maskz_loadu_epi8(rest, source));
    }
  }

  // The codebook as four planes of bytes: a lookup of 64 bytes in 256 is two vpermi2b and a blend, cheaper than
  // gathering floats, and exact for every codebook.
  struct Codebook {
    static constexpr int kPerByte = 1;
    Int plane[4][4];
    explicit Codebook(const float* table) {
      alignas(64) uint8_t bytes[4][256];
      for (int i = 0; i < 256; ++i) {
        const uint32_t bits = bits_of(table[i]);
        for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
      }
      for (int b = 0; b < 4; ++b) {
        for (int q = 0; q < 4; ++q) plane[b][q] = _mm512_load_si512(bytes[b] + 64 * q);
      }
    }
    BNBOPS_HD Int lookup(int b, Int codes, __mmask64 upper_half) const {
      const Int low = _mm512_permutex2var_epi8(plane[b][0], codes, plane[b][1]);
      const Int high = _mm512_permutex2var_epi8(plane[b][2], codes, plane[b][3]);
      return _mm512_mask_mov_epi8(low, upper_half, high);
    }
    BNBOPS_HD void decode(const uint8_t* source, float scale, Float (&out)[4]) const {
      const Int codes = transposed(_mm512_loadu_si512(source));
      const __mmask64 upper_half = _mm512_movepi8_mask(codes);
      const Int byte0 = lookup(0, codes, upper_half), byte1 = lookup(1, codes, upper_half);
      const Int byte2 = lookup(2, codes, upper_half), byte3 = lookup(3, codes, upper_half);
      const Int low01 = _mm512_unpacklo_epi8(byte0, byte1), high01 = _mm512_unpackhi_epi8(byte0, byte1);
      const Int low23 = _mm512_unpacklo_epi8(byte2, byte3), high23 = _mm512_unpackhi_epi8(byte2, byte3);
      const Float factor = splat(scale);
      out[0] = mul(_mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23)), factor);
      out[1] = mul(_mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23)), factor);
      out[2] = mul(_mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23)), factor);
      out[3] = mul(_mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23)), factor);
    }
  };

  // vpermps takes the low 4 bits of an index: it is enough to shift each code to the bottom of its dword.
  struct Codebook4bit {
    static constexpr int kPerByte = 2;
    Float values;
    Int shifts;  // by byte; the lowest one of dword i gets the bits of element i and those above
    Codebook4bit(const float* table, Nibbles nibbles)
        : values(_mm512_loadu_ps(table)),
          shifts(_mm512_xor_si512(_mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60),
                                  splat_int(nibble_shift(nibbles, 0)))) {}
    BNBOPS_HD Float lookup(Int codes) const { return _mm512_permutexvar_ps(codes, values); }
    BNBOPS_HD void decode(const uint8_t* source, float scale, Float (&out)[4]) const {
      for (int v = 0; v < 4; ++v) {
        int64_t codes;
        memcpy(&codes, source + 8 * v, sizeof(codes));
        out[v] = mul(lookup(_mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(codes))), splat(scale));
      }
    }
  };

  struct HalfCodebook4bit {
    Int values;  // twice: an index then needs no masking, since only its lowest 5 bits count
    Int shifts;  // by word; qwords i and i + 4 take their four codes from bit 16i on
    HalfCodebook4bit(const uint16_t* table, Nibbles nibbles)
        : values(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)))),
          shifts(_mm512_add_epi16(
              _mm512_set1_epi64(nibbles == Nibbles::kHighFirst ? 0x0008'000C'0000'0004 : 0x000C'0008'0004'0000),
              _mm512_setr_epi64(0, k16, 2 * k16, 3 * k16, 0, k16, 2 * k16, 3 * k16))) {}
    BNBOPS_HD Int decode(const uint8_t* source) const {
      int64_t codes[2];
      memcpy(codes, source, sizeof(codes));
      const Int halves = _mm512_mask_set1_epi64(_mm512_set1_epi64(codes[0]), 0xF0, codes[1]);
      return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, halves), values);
    }

   private:
    static constexpr int64_t k16 = 0x0010'0010'0010'0010;
  };

  struct Spread {
    Int index;
    BNBOPS_HD explicit Spread(int dwords)
        : index(_mm512_srlv_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                  splat_int(__builtin_ctz(dwords)))) {}
    BNBOPS_HD Float operator()(const float* scales) const { return _mm512_permutexvar_ps(index, load(scales)); }
  };

  BNBOPS_HD static Float load(const float* x) { return _mm512_loadu_ps(x); }
  BNBOPS_HD static Int load_int(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  BNBOPS_HD static void store(float* out, Float x) { _mm512_storeu_ps(out, x); }
  BNBOPS_HD static void store_int(uint8_t* out, Int x) { _mm512_storeu_si512(out, x); }
  BNBOPS_HD static int32_t reduce_max(Int x) { return _mm512_reduce_max_epi32(x); }
  BNBOPS_HD static float reduce_add(Float x) { return _mm512_reduce_add_ps(x); }

  BNBOPS_HD static Float load_bfloat16(const uint16_t* x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
  }
  // In the upper halves; the lower ones are of no use.
  BNBOPS_HD static Int rounded_to_bfloat16(Float x) {
    const Int bits = as_int(x), top = _mm512_srli_epi32(bits, 16);
    return _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_and_si512(top, splat_int(1)), splat_int(0x7FFF)));
  }
  BNBOPS_HD static void store_bfloat16(uint16_t* out, Float x) {
    const Int result =
        _mm512_mask_mov_epi32(shift_right<16>(rounded_to_bfloat16(x)), is_nan(x), splat_int(kNanHalfBits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(result));
  }
  BNBOPS_HD static Float load_float16(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  BNBOPS_HD static void store_float16(uint16_t* out, Float x) {
    const __m256i halves = _mm512_mask_cvtps_ph(_mm256_set1_epi16(kNanHalfBits), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q),
                                                x, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  }

  static constexpr bool kPairs = false;
  struct Paired;
  struct PastCaches;
};

struct Avx512Lanes::PastCaches : Avx512Lanes {
  BNBOPS_HD static void store(float* out, Float x) { _mm512_stream_ps(out, x); }
  BNBOPS_HD static void store_int(uint8_t* out, Int x) { _mm512_stream_si512(reinterpret_cast<Int*>(out), x); }
  static void fence() { _mm_sfence(); }
};

BNBOPS_NAMESPACE_END

#include "cpu/lanes_avx512_codes.h"
