// The dynamic maps, signed and unsigned, decoded and encoded by arithmetic.
//
// The magnitudes of a dynamic map fall into decades; within a decade they are equally spaced, and a decade has twice
// as many as the one below. Counting magnitudes so that a decade holds n ... 2n - 1 (the signed map counts from 0, the
// unsigned one from 1, which is its zero), the exponent of a count tells its decade, and a line gives the magnitude:
// that is what codes mean here, and it leaves the values that bitsandbytes computed by at most 4 ulp. The other way
// round, the nearest magnitude is the number  round(min(slope * |x| + offset, 2n - 1)).
#pragma once

#include "codebooks.h"
#include "codecs/codec.h"
#include "core/lanes_constant.h"
#include "core/lines.h"

BNBOPS_NAMESPACE_BEGIN

struct DynamicMap {
  OctaveLines numbers;    // to magnitudes
  PieceLines magnitudes;  // to numbers as above, of the unsigned map less 1, which are its codes
  float value[kCodebookSize];
};

constexpr int kDecades = 7;

// `magnitude` is the non-negative part of bitsandbytes' map: 0, `count` entries, the last one 1.
constexpr DynamicMap make_dynamic_map(const float* magnitude, int count, bool is_signed) {
  DynamicMap map{};
  const int shift = is_signed ? 0 : 1;
  const auto begin_after = [&](int last) {
    return ConstantLanes::as_int({(static_cast<double>(magnitude[last]) + magnitude[last + 1]) / 2 + kShift, 0});
  };
  int first = 1;
  for (int decade = 1; decade <= kDecades; ++decade) {
    const int size = (is_signed ? 1 : 2) << (decade - 1), last = first + size - 1, octave = decade - 1 + shift;
    const double low = magnitude[first], high = magnitude[last];
    const double apart = size > 1 ? (high - low) / (size - 1) : 0, slope = size > 1 ? 1 / apart : 0;
    map.numbers.slope[octave] = static_cast<float>(apart);
    map.numbers.base[octave] = static_cast<float>(low - map.numbers.slope[octave] * (first + shift));
    map.magnitudes.begin[decade] = begin_after(first - 1);
    map.magnitudes.slope[decade] = static_cast<float>(slope);
    map.magnitudes.offset[decade] = static_cast<float>(first - slope * (low + kShift));
    first = last + 1;
  }
  map.numbers.base[kDecades + shift] = 1;  // the last octave has one number
  map.magnitudes.begin[kDecades + 1] = begin_after(count - 2);
  map.magnitudes.offset[kDecades + 1] = static_cast<float>(count - 1);
  if (is_signed) {
    // A decade of one number, whose line may as well pass 1/2 where the numbers below round to 0.
    const double offset = 8.0 / 9 - 0.5, middle = static_cast<double>(magnitude[1]) / 2 + kShift;
    for (int i = 0; i < 2; ++i) {
      map.magnitudes.offset[i] = static_cast<float>(offset);
      map.magnitudes.slope[i] = static_cast<float>((0.5 - offset) / middle);
    }
  } else {
    map.magnitudes.offset[0] = 1;  // encoders tell zeros themselves
  }
  map.magnitudes.prepare();
  for (int code = 0; code < kCodebookSize; ++code) {
    const int number = is_signed ? code - 127 : code + 1, n = number < 0 ? -number : number;
    int octave = 0;
    while (2 << octave <= n) ++octave;
    const double exact = static_cast<double>(n) * map.numbers.slope[octave] + map.numbers.base[octave];
    map.value[code] = static_cast<float>(n == 0 ? 0 : number < 0 ? -exact : exact);
  }
  return map;
}

constexpr DynamicMap kDynamicMap[2] = {make_dynamic_map(kDynamicUnsigned, 256, false),
                                       make_dynamic_map(kDynamicSigned + 127, 129, true)};

// The largest a that the unsigned map has at 0.
constexpr auto kLargestZero =
    static_cast<float>(ConstantLanes::of_normal_bits(kDynamicMap[false].magnitudes.begin[1] - 1).value);

// Where a - 2^-31 lies among the magnitudes, counted as above: rounded, the number of the nearest one. A constant for
// lanes of those.
template <class Lanes, bool kSigned>
BNBOPS_HD constexpr typename Lanes::Float place_among_magnitudes(typename Lanes::Float a,
                                                                 const typename Lanes::Pieces& pieces) {
  const auto place = pieces(a);
  // A decade of n magnitudes has offset 8/9 n - 1/2, so this is 2n - 1; it binds in no other decade.
  const auto last = Lanes::fma(place.offset, Lanes::splat(2.25F), Lanes::splat(kSigned ? 0.125F : 1.375F));
  return Lanes::min(place.value, last);
}

struct Dynamic8 {
  static constexpr const char* kName = "dynamic8";
  static constexpr CodeType kCodes = CodeType::kUint8;
  static constexpr const float* values(bool is_signed) { return kDynamicMap[is_signed].value; }

  template <class Lanes, bool kSigned>
  struct Decoder {
    typename Lanes::template Octaves<kSigned> octaves{kDynamicMap[kSigned].numbers};

    BNBOPS_HD auto open(const uint8_t* codes) const { return octaves.open(codes); }
    template <class Codes>
    BNBOPS_HD typename Lanes::Float decode(const Codes& codes, int v) const {
      return octaves(codes, v);
    }
  };

  // x must be finite, and not negative for the unsigned map.
  template <class Lanes, bool kSigned, bool kKeepPositive = false>
  struct Encoder {
    using Float = typename Lanes::Float;
    using Int = typename Lanes::Int;
    typename Lanes::Pieces pieces{kDynamicMap[kSigned].magnitudes};

    // Numbers count down in the signed map.
    BNBOPS_HD Int number(Float x, Float inverse) const {
      const auto a = Lanes::fma(kSigned ? Lanes::abs(x) : x, inverse, Lanes::splat(kShift));
      const auto place = place_among_magnitudes<Lanes, kSigned>(a, pieces);
      const auto zero = Lanes::splat(0);
      if constexpr (kSigned && kKeepPositive) {
        return Lanes::round_if_less(zero, x, Lanes::min(Lanes::mul(place, Lanes::splat(-1)), Lanes::splat(-1)));
      } else if constexpr (kSigned) {
        return Lanes::round_against_sign(place, x);
      } else if constexpr (kKeepPositive) {
        return Lanes::round_if_less(zero, x, place);
      } else {
        return Lanes::round_if_less(Lanes::splat(kLargestZero), a, place);
      }
    }
    BNBOPS_HD static void store(const Int (&numbers)[4], uint8_t* codes) {
      kSigned ? Lanes::store_signed(numbers, codes) : Lanes::store_codes(numbers, codes);
    }
  };

  template <bool kSigned>
  static constexpr int kFractionBits = kSigned ? 6 : 7;
  template <bool kSigned>
  static constexpr int code_of_magnitude(uint32_t bits) {
    const PieceLines& lines = kDynamicMap[kSigned].magnitudes;
    const ConstantLanes::Pieces pieces(lines);
    const auto place = place_among_magnitudes<ConstantLanes, kSigned>(ConstantLanes::of_normal_bits(bits), pieces);
    if (!kSigned && bits < lines.begin[1]) return 0;
    return ConstantLanes::round(place) + (kSigned ? 127 : 0);
  }

  // 254 - code where an element is negative, but 0 for the largest magnitude, which the map has only once.
  BNBOPS_HD static uint32_t with_signs(uint32_t codes, uint32_t negative) {
    const uint32_t flipped = ~codes & negative, above_zero = (flipped + 0x7F7F7F7FU) >> 7 & 0x01010101U;
    return (codes ^ negative) - above_zero;
  }
};

BNBOPS_NAMESPACE_END
