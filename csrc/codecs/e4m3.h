// 8-bit floating-point numbers, float8_e4m3fn: the OCP's E4M3, whose largest number is 448. Codes are its bytes, over
// 448.
//
// Numbers count from 0 by ones through 7 subnormal ones, multiples of 2^-9, and then through octaves of 8: so many
// units of 2^20 apart are the bits of a float32, and the subnormal ones are those of an octave that begins at 2^-6.
#pragma once

#include "codecs/codec.h"
#include "core/lanes_constant.h"

BNBOPS_NAMESPACE_BEGIN

constexpr float kLargestE4m3 = 448;
constexpr float kInverseE4m3 = 1 / kLargestE4m3;  // times 448, this is 1
constexpr float kShiftE4m3 = kLargestE4m3 * kShift;
constexpr float kSmallestNormalE4m3 = 0.015625F;  // 2^-6
constexpr float kFirstTieE4m3 = 0.0009765625F;    // 2^-10: from there on, a magnitude is nearer to 2^-9 than to 0

struct E4m3Values {
  float value[kCodebookSize];
};

constexpr E4m3Values make_e4m3_values() {
  E4m3Values values{};
  for (int k = 0; k < 128; ++k) {
    double value = k < 8 ? k / 512.0 : (8 + k % 8) / 512.0;
    for (int octave = 1; octave < k / 8; ++octave) value *= 2;
    values.value[k] = static_cast<float>(value * kInverseE4m3);
    values.value[k + 128] = -values.value[k];
  }
  return values;
}

constexpr E4m3Values kE4m3 = make_e4m3_values();

// 448 * |x| plus something, from a = |x| + 2^-31.
template <class Lanes>
BNBOPS_HD constexpr typename Lanes::Float in_e4m3(typename Lanes::Float a, float plus) {
  return Lanes::fma(a, Lanes::splat(kLargestE4m3), Lanes::splat(plus - kShiftE4m3));
}

// The number nearest to 448 * |x|, the larger one in a tie. A constant for lanes of those.
template <class Lanes>
BNBOPS_HD constexpr typename Lanes::Int e4m3_number(typename Lanes::Float a) {
  constexpr int kUnit = 1 << 20, kFirstNormal = 121 << 3, kSubnormals = 8;
  const auto x = in_e4m3<Lanes>(a, 0), shifted = in_e4m3<Lanes>(a, kSmallestNormalE4m3);
  const auto smallest = Lanes::splat(kSmallestNormalE4m3);
  const auto bits = Lanes::add(Lanes::as_int(Lanes::select_if_less(x, smallest, shifted, x)), kUnit / 2);
  const auto number = Lanes::add(Lanes::template shift_right<20>(bits), kSubnormals - kFirstNormal);
  return Lanes::add_if_less(number, -kSubnormals, x, smallest);
}

struct E4m3 {
  static constexpr const char* kName = "e4m3";
  static constexpr CodeType kCodes = CodeType::kFloat8;
  static constexpr const float* values(bool /*is_signed*/) { return kE4m3.value; }

  template <class Lanes, bool kSigned>
  struct Decoder {
    BNBOPS_HD auto open(const uint8_t* codes) const { return Lanes::open_float8(codes); }
    template <class Codes>
    BNBOPS_HD typename Lanes::Float decode(const Codes& codes, int v) const {
      return Lanes::mul(Lanes::float8(codes, v), Lanes::splat(kInverseE4m3 * kFloat8Unit));
    }
  };

  template <class Lanes, bool kSigned, bool kKeepPositive = false>
  struct Encoder {
    BNBOPS_HD static void store(const typename Lanes::Int (&numbers)[4], uint8_t* codes) {
      Lanes::store_codes(numbers, codes);
    }
    BNBOPS_HD static typename Lanes::Int number(typename Lanes::Float x, typename Lanes::Float inverse) {
      const auto zero = Lanes::splat(0.0F);
      if constexpr (kKeepPositive) x = Lanes::select_if_less(zero, x, x, zero);
      const auto a = Lanes::fma(kSigned ? Lanes::abs(x) : x, inverse, Lanes::splat(kShift));
      const auto k = e4m3_number<Lanes>(a);
      if constexpr (kKeepPositive) return Lanes::max(k, Lanes::add_if_less(Lanes::splat_int(0), 1, zero, x));
      if constexpr (!kSigned) return k;
      const auto shifted = in_e4m3<Lanes>(a, kSmallestNormalE4m3);
      const auto tie = Lanes::splat(kSmallestNormalE4m3 + kFirstTieE4m3);  // what rounds to 0 has no sign
      return Lanes::add_if_less(k, 128, Lanes::select_if_less(shifted, tie, zero, x), zero);
    }
  };

  template <bool kSigned>
  static constexpr int kFractionBits = 6;
  template <bool kSigned>
  static constexpr int code_of_magnitude(uint32_t bits) {
    return static_cast<int>(e4m3_number<ConstantLanes>(ConstantLanes::of_normal_bits(bits)));
  }

  // The sign bit, but of 0.
  BNBOPS_HD static uint32_t with_signs(uint32_t codes, uint32_t negative) {
    return codes | ((codes + 0x7F7F7F7FU) & negative & 0x80808080U);
  }
};

BNBOPS_NAMESPACE_END
