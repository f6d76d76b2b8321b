// Encoding to any sorted map of 256 entries.
#pragma once

#include "codecs/codec.h"

BNBOPS_NAMESPACE_BEGIN

// midpoint[k] lies between entries k and k + 1; the last one is infinite.
struct NearestEncoder {
  float midpoint[kCodebookSize];
};

BNBOPS_HD float midpoint_after(const float* codebook, int k) {
  return k + 1 < kCodebookSize ? 0.5F * codebook[k] + 0.5F * codebook[k + 1] : float_from_bits(kInfinityBits);
}

// The number of midpoints below x, by binary search: the nearest entry, the lower one in a tie.
template <class Lanes>
BNBOPS_HD typename Lanes::Int nearest_entry(typename Lanes::Float x, const NearestEncoder& encoder) {
  auto position = Lanes::splat_int(0);
  for (int step = kCodebookSize / 2; step > 0; step /= 2) {
    const auto midpoint = Lanes::gather(encoder.midpoint + step - 1, position);
    position = Lanes::add_if_less(position, step, midpoint, x);
  }
  return position;
}

// The same number by two look-ups instead of eight, for large inputs. A bucket holds the x whose |x| + 2^-31 agree in
// exponent and 7 bits of fraction. Where no bucket has more than one midpoint, the number of midpoints below the
// bucket and one comparison tell.
constexpr int kBuckets = 32 << 7;  // for either sign

struct BucketEncoder {
  NearestEncoder nearest;
  uint8_t below[2 * kBuckets + 3];  // negative x in the second half; padded for gathers
};

template <class Lanes>
BNBOPS_HD typename Lanes::Int bucketed_entry(typename Lanes::Float x, const BucketEncoder& encoder) {
  constexpr int kFirst = kSmallestOctave << 7;
  const auto a = Lanes::fma(Lanes::abs(x), Lanes::splat(1.0F), Lanes::splat(kShift));
  const auto bucket = Lanes::add(Lanes::template shift_right<16>(Lanes::as_int(a)), -kFirst);
  const auto below = Lanes::gather(encoder.below, Lanes::add_if_less(bucket, kBuckets, x, Lanes::splat(0.0F)));
  return Lanes::add_if_less(below, 1, Lanes::gather(encoder.nearest.midpoint, below), x);
}

BNBOPS_NAMESPACE_END
