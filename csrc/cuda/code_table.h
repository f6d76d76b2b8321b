// Encoding to a dynamic map by one look-up, made by the arithmetic of codecs/dynamic8.h: the same codes by fewer
// instructions.
//
// The code is a staircase over a = |x| * inverse + 2^-31. A bucket holds the a that agree in exponent and some bits of
// fraction, enough that no bucket has two steps. Its entry is such that
//     entry + (bits of a << kLift)
// has the code in the upper 8 bits: within a bucket, the bits of a fill the lower 24, and carry from its step on.
#pragma once

#include "codecs/codec.h"
#include "codecs/dynamic8.h"
#include "cuda/device.h"

namespace bnbops::cuda {

// Lanes of constants, with what place_among_magnitudes needs.
struct ConstantLanes {
  struct Float {
    double value;
    uint32_t bits;  // known of what is not computed
  };
  using Int = uint32_t;

  static constexpr Float of_normal_bits(uint32_t bits) {
    double x = 1 + static_cast<double>(bits & 0x7FFFFFU) / (1 << 23);
    for (uint32_t exponent = bits >> 23; exponent < 127; ++exponent) x /= 2;
    for (uint32_t exponent = bits >> 23; exponent > 127; --exponent) x *= 2;
    return {x, bits};
  }

  struct Table32 {
    const uint32_t* bits;
    constexpr explicit Table32(const uint32_t* table) : bits(table) {}
    constexpr Float operator[](Int i) const { return of_normal_bits(bits[i % 32]); }
  };
  struct Table16 {
    const float* values;
    constexpr explicit Table16(const float* table) : values(table) {}
    constexpr Float operator[](Int i) const { return {values[i % 16], 0}; }
  };

  static constexpr Float splat(float x) { return {x, 0}; }
  // One rounding: in fp64 these products and sums are exact.
  static constexpr Float fma(Float a, Float b, Float c) { return {static_cast<float>(a.value * b.value + c.value), 0}; }
  static constexpr Float min(Float a, Float b) { return a.value < b.value ? a : b; }
  static constexpr Int as_int(Float x) { return x.bits; }
  template <int kBits>
  static constexpr Int shift_right(Int i) {
    return i >> kBits;
  }
  static constexpr Int increment_if_not_less(Int i, Float a, Float b) { return i + (a.value >= b.value); }
  // To nearest, ties to even.
  static constexpr int round(Float x) {
    const int below = static_cast<int>(x.value);
    const double rest = x.value - below;
    return rest > 0.5 || (rest == 0.5 && below % 2 != 0) ? below + 1 : below;
  }
};

// The number of the magnitude for 2^-31 <= a <= 1, of which these are the bits.
constexpr int magnitude_of(uint32_t bits, const DynamicTables<ConstantLanes>& tables) {
  return ConstantLanes::round(place_among_magnitudes(ConstantLanes::of_normal_bits(bits), tables));
}

// Of the magnitudes of a map; for the signed one, they have the codes of positive elements.
template <bool kSigned>
struct alignas(16) CodeTable {
  static constexpr int kFractionBits = kSigned ? 6 : 7;  // the least that keeps steps apart
  static constexpr int kBucketBits = 23 - kFractionBits, kLift = 24 - kBucketBits;
  static constexpr uint32_t kFirst = static_cast<uint32_t>(kSmallestOctave) << kFractionBits;
  static constexpr uint32_t kCount = 32U << kFractionBits;

  uint32_t entry[kCount];

  // Has the code in the upper 8 bits; 2^-31 <= a < 2.
  BNBOPS_DEVICE uint32_t code(float a) const {
    return entry[(bits_of(a) >> kBucketBits) - kFirst] + (bits_of(a) << kLift);
  }
};

template <bool kSigned>
constexpr CodeTable<kSigned> make_code_table(const DynamicEncoder& encoder) {
  using Table = CodeTable<kSigned>;
  constexpr uint32_t kWidth = 1U << Table::kBucketBits;
  Table table{};
  const DynamicTables<ConstantLanes> tables(encoder);
  uint32_t first = static_cast<uint32_t>(kSmallestOctave) << 23;
  int k = magnitude_of(first, tables);
  for (uint32_t& entry : table.entry) {
    constexpr uint32_t kOne = 127U << 23;
    const uint32_t end = first + kWidth;
    const int next = first >= kOne ? k : magnitude_of(end, tables);
    uint32_t low = first, high = end;  // k holds at `low`, `next` from `high` on
    while (next != k && high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (magnitude_of(middle, tables) == k ? low : high) = middle;
    }
    const uint32_t code = static_cast<uint32_t>(next + (kSigned ? 127 : -1));
    entry = (code << 24) - ((next == k ? first : high) << Table::kLift);
    first = end;
    k = next;
  }
  return table;
}

}  // namespace bnbops::cuda
