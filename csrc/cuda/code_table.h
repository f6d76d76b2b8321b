// Encoding to a dynamic map by one look-up, made of the arithmetic of codecs.h: the same codes by fewer instructions.
//
// The code is a staircase over a = |x| * inverse + 2^-31. A bucket holds the a that agree in exponent and some bits of
// fraction, enough that no bucket has two steps. Its entry is such that
//     entry + (bits of a << kLift)
// has the code in the upper 8 bits: within a bucket, the bits of a fill the lower 24, and carry from its step on.
#pragma once

#include "codecs.h"
#include "cuda/device.h"

namespace bnbops::cuda {

constexpr float float_of_normal_bits(uint32_t bits) {
  double x = 1 + static_cast<double>(bits & 0x7FFFFFU) / (1 << 23);
  for (uint32_t exponent = bits >> 23; exponent < 127; ++exponent) x /= 2;
  return static_cast<float>(x);
}

// What nearest_magnitude of codecs.h makes of `a`, 2^-31 <= a <= 1, as a constant: fp64 rounds neither its products nor
// its sums.
constexpr int magnitude_of(uint32_t bits, const DynamicEncoder& encoder) {
  const uint32_t boundary = encoder.boundary[(bits >> 23) - kSmallestOctave];
  const uint32_t decade = boundary % 16 + (bits >= boundary);
  const double slope = encoder.slope[decade], offset = encoder.offset[decade];
  const auto last = static_cast<float>(offset * 2.25 + 0.125);
  auto k = static_cast<float>(float_of_normal_bits(bits) * slope + offset);
  if (k > last) k = last;
  const int below = static_cast<int>(k);
  const float rest = k - static_cast<float>(below);
  return rest > 0.5F || (rest == 0.5F && below % 2 != 0) ? below + 1 : below;
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
  uint32_t first = static_cast<uint32_t>(kSmallestOctave) << 23;
  int k = magnitude_of(first, encoder);
  for (uint32_t& entry : table.entry) {
    constexpr uint32_t kOne = 127U << 23;
    const uint32_t end = first + kWidth;
    const int next = first >= kOne ? k : magnitude_of(end, encoder);
    uint32_t low = first, high = end;  // k holds at `low`, `next` from `high` on
    while (next != k && high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (magnitude_of(middle, encoder) == k ? low : high) = middle;
    }
    const uint32_t code = static_cast<uint32_t>(next + (kSigned ? 127 : -1));
    entry = (code << 24) - ((next == k ? first : high) << Table::kLift);
    first = end;
    k = next;
  }
  return table;
}

}  // namespace bnbops::cuda
