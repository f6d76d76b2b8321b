// What a codec's codes mean and which ones elements have, as tables in a device's memory.
#pragma once

#include "codecs/codec.h"
#include "cuda/elements.h"
#include "cuda/threads.h"

namespace bnbops::cuda {

// ---- encoding ------------------------------------------------------------------------------------------------------

// Encoding by one look-up, in a table that is made of what a codec says of magnitudes: the codes of its arithmetic by
// fewer instructions.
//
// The code is a staircase over a = |x| * inverse + 2^-31. A bucket holds the a that agree in exponent and some bits of
// fraction, enough that no bucket has two steps. Its entry is such that
//     entry + (bits of a << kLift)
// has the code in the upper 8 bits: within a bucket, the bits of a fill the lower 24, and carry from its step on.

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

// ---- maps ----------------------------------------------------------------------------------------------------------

template <class Codec, bool kSigned>
struct alignas(16) Map {
  float value[kCodebookSize];
  CodeTable<Codec, kSigned> code;
};

template <class Codec, bool kSigned>
constexpr Map<Codec, kSigned> make_map() {
  Map<Codec, kSigned> map{};
  for (int i = 0; i < kCodebookSize; ++i) map.value[i] = Codec::values(kSigned)[i];
  map.code = make_code_table<Codec, kSigned>();
  return map;
}

template <class Codec, bool kSigned>
static __device__ const Map<Codec, kSigned> kMap = make_map<Codec, kSigned>();

// The codes of encodable elements, which are not negative for the unsigned map. `inverse` is that of their scale, which
// keeps `a` below 2. With kKeepPositive, the smallest positive code is that of whatever is positive and nearer to 0,
// and what is negative, as no divisor is unless a checkpoint has it so, has the code of 0.
template <bool kKeepPositive = false, class Codec, bool kSigned>
BNBOPS_DEVICE uint2 codes_of(const float (&x)[kOctet], float inverse, const CodeTable<Codec, kSigned>& table) {
  constexpr uint32_t kZero = Codec::template code_of_magnitude<kSigned>(kZeroBits), kSmallestPositive = kZero + 1;
  uint32_t code[kOctet];
  unrolled<kOctet>([&](int i) {
    code[i] = table.code(fused_multiply_add(fabsf(x[i]), inverse, kShift));
    if (kKeepPositive && x[i] > 0 && code[i] < kSmallestPositive << 24) code[i] = kSmallestPositive << 24;
    if (kKeepPositive && kSigned && x[i] < 0) code[i] = kZero << 24;
  });
  uint32_t word[2];
  unrolled<2>([&](int i) {
    word[i] = pack_bytes<3>(code + 4 * i);
    if (kSigned && !kKeepPositive) word[i] = Codec::with_signs(word[i], pack_signs(x + 4 * i));
  });
  return make_uint2(word[0], word[1]);
}

}  // namespace bnbops::cuda
