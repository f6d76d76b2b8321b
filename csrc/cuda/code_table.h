// Encoding by one look-up, in a table that is made of what a codec says of magnitudes: the codes of its arithmetic by
// fewer instructions.
//
// The code is a staircase over a = |x| * inverse + 2^-31. A bucket holds the a that agree in exponent and some bits of
// fraction, enough that no bucket has two steps. Its entry is such that
//     entry + (bits of a << kLift)
// has the code in the upper 8 bits: within a bucket, the bits of a fill the lower 24, and carry from its step on.
#pragma once

#include "codecs/codec.h"
#include "cuda/device.h"

namespace bnbops::cuda {

constexpr uint32_t kZeroBits = static_cast<uint32_t>(kSmallestOctave) << 23;  // of a where x is 0
constexpr uint32_t kOneBits = 127U << 23;                                     // as good as that of the largest x

// Whether no bucket has two of a codec's steps.
template <class Codec, bool kSigned>
constexpr bool steps_are_apart() {
  int code = Codec::template code_of_magnitude<kSigned>(kZeroBits), next = code;
  for (uint32_t at = kZeroBits; at < kOneBits && next - code <= 1;) {
    code = next;
    next = Codec::template code_of_magnitude<kSigned>(at += 1U << (23 - Codec::template kFractionBits<kSigned>));
  }
  return next - code <= 1;
}

template <class Codec, bool kSigned>
struct alignas(16) CodeTable {
  static constexpr int kFractionBits = Codec::template kFractionBits<kSigned>;
  static constexpr int kBucketBits = 23 - kFractionBits, kLift = 24 - kBucketBits;
  static constexpr uint32_t kFirst = kZeroBits >> kBucketBits, kCount = 32U << kFractionBits;

  uint32_t entry[kCount];

  // Has the code in the upper 8 bits; 2^-31 <= a < 2.
  BNBOPS_DEVICE uint32_t code(float a) const {
    return entry[(bits_of(a) >> kBucketBits) - kFirst] + (bits_of(a) << kLift);
  }
};

template <class Codec, bool kSigned>
constexpr CodeTable<Codec, kSigned> make_code_table() {
  static_assert(steps_are_apart<Codec, kSigned>(), "the codec wants more kFractionBits");
  using Table = CodeTable<Codec, kSigned>;
  Table table{};
  uint32_t first = kZeroBits;
  int code = Codec::template code_of_magnitude<kSigned>(first);
  for (uint32_t& entry : table.entry) {
    const uint32_t end = first + (1U << Table::kBucketBits);
    const int next = first >= kOneBits ? code : Codec::template code_of_magnitude<kSigned>(end);
    uint32_t low = first, high = end;  // `code` holds at `low`, `next` from `high` on
    while (next != code && high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (Codec::template code_of_magnitude<kSigned>(middle) == code ? low : high) = middle;
    }
    entry = (static_cast<uint32_t>(next) << 24) - ((next == code ? first : high) << Table::kLift);
    first = end;
    code = next;
  }
  return table;
}

}  // namespace bnbops::cuda
