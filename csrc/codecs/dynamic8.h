// The dynamic maps, signed and unsigned, and encoding to them by arithmetic.
//
// The magnitudes of a dynamic map fall into decades; within a decade they are equally spaced, and a decade has twice
// as many as the one below. Counting magnitudes so that a decade holds n ... 2n - 1 (the signed map counts from 0, the
// unsigned one from 1, which is its zero), the nearest one is  round(min(slope * |x| + offset, 2n - 1)).
// The decade follows from the binary exponent: every octave [2^e, 2^(e+1)) holds at most one boundary between decades.
// The boundary's float carries the number of the decade below it in its low 4 bits (it moves by at most 8 ulp), so one
// table lookup gives both. All tables are for |x| + 2^-31, which makes the exponents of all inputs 32 neighbours.
#pragma once

#include "codebooks.h"
#include "codecs/codec.h"
#include "core/lanes_constant.h"

BNBOPS_NAMESPACE_BEGIN

struct DynamicEncoder {
  uint32_t boundary[32];  // by octave: boundary float, its low 4 bits replaced by the decade below
  float slope[16];        // by decade: 0 = zero, 1 ... 7 = the map's decades, 8 = exactly one
  float offset[16];
};

constexpr int kDecades = 7;

constexpr uint32_t boundary_bits(float at, int octave, int decade_below) {
  double power = 1;
  for (int e = octave; e < 31; ++e) power /= 2;
  const double fraction = static_cast<double>(at) / power - 1;
  const auto exact = static_cast<int64_t>(fraction * (1 << 23));
  const int64_t rounded = ((exact - decade_below + 8) / 16) * 16 + decade_below;
  return static_cast<uint32_t>((static_cast<int64_t>(kSmallestOctave + octave) << 23) + rounded);
}

// `magnitude` is the map's non-negative part: magnitude[0] = 0, `count` entries, the last one 1.
constexpr DynamicEncoder make_dynamic_encoder(const float* magnitude, int count, bool is_signed) {
  DynamicEncoder encoder{};
  const int shift = is_signed ? 0 : 1;
  float boundary[kDecades + 1]{};
  encoder.offset[0] = static_cast<float>(shift);
  int first = 1;
  for (int decade = 1; decade <= kDecades; ++decade) {
    const int size = (is_signed ? 1 : 2) << (decade - 1), last = first + size - 1;
    const double low = magnitude[first], high = magnitude[last];
    const double slope = size > 1 ? (size - 1) / (high - low) : 0;
    encoder.slope[decade] = static_cast<float>(slope);
    encoder.offset[decade] = static_cast<float>(first + shift - slope * (low + kShift));
    boundary[decade - 1] = static_cast<float>((static_cast<double>(magnitude[first - 1]) + low) / 2 + kShift);
    first = last + 1;
  }
  boundary[kDecades] = static_cast<float>((static_cast<double>(magnitude[count - 2]) + 1) / 2 + kShift);
  encoder.offset[kDecades + 1] = static_cast<float>(count - 1 + shift);

  int decade = 0;
  double top = 1.0 / (1U << 30);  // upper end of octave 0
  for (int octave = 0; octave < 32; ++octave, top *= 2) {
    if (decade <= kDecades && static_cast<double>(boundary[decade]) < top) {
      encoder.boundary[octave] = boundary_bits(boundary[decade], octave, decade);
      ++decade;
    } else {
      encoder.boundary[octave] = 0x7F7FFFF0U + static_cast<uint32_t>(decade);  // above every input
    }
  }
  return encoder;
}

constexpr DynamicEncoder kEncodeSigned = make_dynamic_encoder(kDynamicSigned + 127, 129, true);
constexpr DynamicEncoder kEncodeUnsigned = make_dynamic_encoder(kDynamicUnsigned, 256, false);

// The encoder with its tables where the lanes want them (registers, for SIMD).
template <class Lanes>
struct DynamicTables {
  typename Lanes::Table32 boundary;
  typename Lanes::Table16 slope, offset;
  BNBOPS_HD constexpr explicit DynamicTables(const DynamicEncoder& e)
      : boundary(e.boundary), slope(e.slope), offset(e.offset) {}
};

// Where a - 2^-31 lies among the magnitudes, counted as above: rounded, the number of the nearest one. A constant for
// lanes of those.
template <class Lanes>
BNBOPS_HD constexpr typename Lanes::Float place_among_magnitudes(typename Lanes::Float a,
                                                                 const DynamicTables<Lanes>& tables) {
  const auto boundary = tables.boundary[Lanes::template shift_right<23>(Lanes::as_int(a))];
  const auto decade = Lanes::increment_if_not_less(Lanes::as_int(boundary), a, boundary);
  const auto slope = tables.slope[decade], offset = tables.offset[decade];
  // A decade of n magnitudes has offset 8/9 n - 1/2, so this is 2n - 1; it binds in no other decade.
  const auto last = Lanes::fma(offset, Lanes::splat(2.25F), Lanes::splat(0.125F));
  return Lanes::min(Lanes::fma(a, slope, offset), last);
}

// Number of the nearest magnitude to x * inverse; for the signed map with the sign of x. x must be finite, and not
// negative for the unsigned map.
template <class Lanes, bool kSigned>
BNBOPS_HD typename Lanes::Int nearest_magnitude(typename Lanes::Float x, typename Lanes::Float inverse,
                                                const DynamicTables<Lanes>& tables) {
  const auto a = Lanes::fma(kSigned ? Lanes::abs(x) : x, inverse, Lanes::splat(kShift));
  const auto k = place_among_magnitudes(a, tables);
  return kSigned ? Lanes::round_with_sign(k, x) : Lanes::round(k);
}

// Likewise; with kKeepPositive, the smallest positive entry stands for whatever is positive and nearer to 0.
template <class Lanes, bool kSigned, bool kKeepPositive>
BNBOPS_HD typename Lanes::Int numbered_magnitude(typename Lanes::Float x, typename Lanes::Float inverse,
                                                 const DynamicTables<Lanes>& tables) {
  const auto k = nearest_magnitude<Lanes, kSigned>(x, inverse, tables);
  if constexpr (!kKeepPositive) return k;
  return Lanes::max(k, Lanes::add_if_less(Lanes::splat_int(!kSigned), 1, Lanes::splat(0), x));
}

struct Dynamic8 {
  static constexpr const char* kName = "dynamic8";
  static constexpr CodeType kCodes = CodeType::kUint8;
  static constexpr const float* values(bool is_signed) { return is_signed ? kDynamicSigned : kDynamicUnsigned; }

  template <class Lanes, bool kSigned, bool kKeepPositive = false>
  struct Encoder {
    DynamicTables<Lanes> tables{kSigned ? kEncodeSigned : kEncodeUnsigned};

    BNBOPS_HD void encode(const typename Lanes::Float (&x)[4], typename Lanes::Float inverse, uint8_t* codes) const {
      typename Lanes::Int k[4];
      for (int i = 0; i < 4; ++i) k[i] = numbered_magnitude<Lanes, kSigned, kKeepPositive>(x[i], inverse, tables);
      kSigned ? Lanes::store_signed(k, codes) : Lanes::store_unsigned(k, codes);
    }
  };

  template <bool kSigned>
  static constexpr int kFractionBits = kSigned ? 6 : 7;
  template <bool kSigned>
  static constexpr int code_of_magnitude(uint32_t bits) {
    const DynamicTables<ConstantLanes> tables(kSigned ? kEncodeSigned : kEncodeUnsigned);
    const auto place = place_among_magnitudes(ConstantLanes::of_normal_bits(bits), tables);
    return ConstantLanes::round(place) + (kSigned ? 127 : -1);
  }

  // 254 - code where an element is negative, but 0 for the largest magnitude, which the map has only once.
  BNBOPS_HD static uint32_t with_signs(uint32_t codes, uint32_t negative) {
    const uint32_t flipped = ~codes & negative, above_zero = (flipped + 0x7F7F7F7FU) >> 7 & 0x01010101U;
    return (codes ^ negative) - above_zero;
  }
};

BNBOPS_NAMESPACE_END
