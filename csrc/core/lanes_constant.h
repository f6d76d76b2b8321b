// Lanes of constants, with what codecs compute at compile time.
#pragma once

#include <cstdint>

#include "core/lines.h"

BNBOPS_NAMESPACE_BEGIN

struct ConstantLanes {
  struct Float {
    double value;
    uint32_t bits;  // 0 of what is computed
  };
  using Int = uint32_t;

  static constexpr Float of_normal_bits(uint32_t bits) {
    double x = 1 + static_cast<double>(bits & 0x7FFFFFU) / (1 << 23);
    for (uint32_t exponent = bits >> 23; exponent < 127; ++exponent) x /= 2;
    for (uint32_t exponent = bits >> 23; exponent > 127; --exponent) x *= 2;
    return {x, bits};
  }

  struct Place {
    Float value, offset;
  };
  struct Pieces {
    const PieceLines& lines;
    constexpr explicit Pieces(const PieceLines& all) : lines(all) {}
    constexpr Place operator()(Float a) const {
      const uint32_t i = lines.piece(as_int(a));
      return {fma(a, splat(lines.slope[i]), splat(lines.offset[i])), splat(lines.offset[i])};
    }
  };

  static constexpr Float splat(float x) { return {x, 0}; }
  // One rounding: in fp64 these products and sums are exact.
  static constexpr Float fma(Float a, Float b, Float c) { return {static_cast<float>(a.value * b.value + c.value), 0}; }
  static constexpr Float select_if_less(Float a, Float b, Float x, Float y) { return a.value < b.value ? x : y; }
  static constexpr Int add(Int i, int x) { return i + static_cast<Int>(x); }
  static constexpr Int add_if_less(Int i, int step, Float a, Float b) { return a.value < b.value ? add(i, step) : i; }
  static constexpr Float min(Float a, Float b) { return a.value < b.value ? a : b; }
  // Of a positive, normal number.
  static constexpr Int as_int(Float x) {
    if (x.bits != 0) return x.bits;
    uint32_t exponent = 127;
    double fraction = x.value;
    for (; fraction < 1; --exponent) fraction *= 2;
    for (; fraction >= 2; ++exponent) fraction /= 2;
    return (exponent << 23) + static_cast<uint32_t>((fraction - 1) * (1 << 23));
  }
  template <int kBits>
  static constexpr Int shift_right(Int i) {
    return i >> kBits;
  }
  // To nearest, ties to even.
  static constexpr int round(Float x) {
    const int below = static_cast<int>(x.value);
    const double rest = x.value - below;
    return rest > 0.5 || (rest == 0.5 && below % 2 != 0) ? below + 1 : below;
  }
};

BNBOPS_NAMESPACE_END
