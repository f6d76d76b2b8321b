// What the bits of a 4-bit weight mean, written once, for scalar code, SIMD and devices.
//
// Elements are numbered in logical order, over rows. Two codes share a byte, the even element in its upper half; an odd
// count ends with the code of 0. Element i has the value codebook[code[i]] * absmax[i / blocksize].
// Encoding takes the nearest entry to x * (1 / absmax), the lower one in a tie, after the care of codecs/codec.h for
// elements that are not finite. Source of NF4: Dettmers et al., "QLoRA" (arXiv:2305.14314), appendix E.
#pragma once

#include <initializer_list>

#include "codebooks.h"
#include "codecs/codec.h"
#include "ops/jobs.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kCodebook4bit = 16;
constexpr int kBuckets4bit = 16;  // of magnitudes, 1/16 wide each

// One comparison tells the code, since a bucket holds at most one midpoint. Buckets 16 ... 31 are for positive
// elements, 0 ... 15 for the others. FP4's two zeros count as neighbours with the midpoint 0, which lies between the
// two halves.
struct Encoder4bit {
  uint32_t threshold[2 * kBuckets4bit];  // a float: magnitudes above it get `beyond` ...
  uint32_t beyond[2 * kBuckets4bit];
  uint32_t within[2 * kBuckets4bit];  // ... and the others `within`
};

// The largest float below x, for 0 < x < 2, in constant expressions: there x and its neighbour are exact as doubles.
constexpr float below(float x) {
  double ulp = 1.0 / (1 << 23);
  while (static_cast<double>(x) <= ulp * (1 << 23)) ulp /= 2;
  return static_cast<float>(static_cast<double>(x) - ulp);
}

// bits_of in constant expressions, for 2^-20 < x < 1.
constexpr uint32_t fraction_bits(float x) {
  uint32_t exponent = 127;
  double scaled = x;
  for (; scaled < 1; scaled *= 2) --exponent;
  return (exponent << 23) + static_cast<uint32_t>((scaled - 1) * (1 << 23));
}

// `order` numbers the codebook's entries from the smallest to the largest.
constexpr Encoder4bit make_encoder_4bit(const float* values, const uint8_t (&order)[kCodebook4bit]) {
  constexpr uint32_t kNever = 0x7F800000U;
  Encoder4bit encoder{};
  for (const bool positive : {false, true}) {
    // Entries by growing magnitude, beginning with the one for 0 (or for the smallest positive element).
    int at = 0;
    while (values[order[at]] < 0) ++at;
    if (positive && values[order[at + 1]] == 0) ++at;
    const int step = positive ? 1 : -1, end = positive ? kCodebook4bit - 1 : 0;
    for (int bucket = 0; bucket < kBuckets4bit; ++bucket) {
      const int slot = bucket + (positive ? kBuckets4bit : 0);
      encoder.within[slot] = encoder.beyond[slot] = order[at];
      encoder.threshold[slot] = kNever;
      if (at == end) continue;
      const float midpoint = 0.5F * values[order[at]] + 0.5F * values[order[at + step]];
      const float magnitude = positive ? midpoint : -midpoint;
      if (magnitude >= static_cast<float>(bucket + 1) / kBuckets4bit) continue;
      // The division by zero stops the compiler: two midpoints in a bucket, or one that rounding could misplace.
      const float edge = static_cast<float>(bucket) / kBuckets4bit, margin = 1e-5F;
      const bool clear = magnitude > edge + margin && magnitude < edge + 1.0F / kBuckets4bit - margin;
      at /= clear ? 1 : 0;
      // Strictly greater elements take the higher entry: a negative one in a tie has passed its midpoint.
      encoder.threshold[slot] = fraction_bits(positive ? magnitude : below(magnitude));
      at += step;
      encoder.beyond[slot] = order[at];
    }
  }
  return encoder;
}

constexpr Encoder4bit kEncodeNF4 = make_encoder_4bit(kNF4, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
constexpr Encoder4bit kEncodeFP4 = make_encoder_4bit(kFP4, {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3});

// For the host: devices have copies of their own.
inline const float* codebook_of(QuantType type) { return type == QuantType::kNF4 ? kNF4 : kFP4; }
inline const Encoder4bit& encoder_of(QuantType type) { return type == QuantType::kNF4 ? kEncodeNF4 : kEncodeFP4; }

template <class Lanes>
struct EncoderTables4bit {
  typename Lanes::Table32 threshold, within, beyond;
  BNBOPS_HD explicit EncoderTables4bit(const Encoder4bit& e)
      : threshold(e.threshold), within(e.within), beyond(e.beyond) {}
};

// Codes of finite elements x, in the low bits.
template <class Lanes>
BNBOPS_HD typename Lanes::Int encode_4bit(typename Lanes::Float x, typename Lanes::Float inverse,
                                          const EncoderTables4bit<Lanes>& tables) {
  const auto magnitude = Lanes::mul(Lanes::abs(x), inverse);
  // side * (1 + magnitude): its exponent's lowest bit tells the side, its upper four fraction bits the bucket. The
  // magnitude's rounding to a multiple of 2^-23 crosses a bucket's edge only where no midpoint is near.
  const auto side = Lanes::select_if_less(Lanes::splat(0.0F), x, Lanes::splat(1.0F), Lanes::splat(2.0F));
  const auto position = Lanes::fma(Lanes::min(magnitude, Lanes::splat(0.96875F)), side, side);
  const auto slot = Lanes::template shift_right<19>(Lanes::as_int(position));
  return Lanes::as_int(
      Lanes::select_if_less(tables.threshold[slot], magnitude, tables.beyond[slot], tables.within[slot]));
}

// The scale of a block whose scale is itself quantized ("double quantization", QLoRA section 3).
BNBOPS_HD float nested_scale(float entry, float nested_absmax, float offset) {
  const float product = entry * nested_absmax;
  return product + offset;
}

// A block's scale as memory has it: loading is apart from computing, so that loads can be far ahead.
struct StoredScale {
  float absmax;  // of the block, or of the codes of scales
  uint8_t code;  // if the scales are nested
};

BNBOPS_HD StoredScale load_scale(const Weight4bit& weight, int64_t block) {
  if (weight.absmax != nullptr) return {weight.absmax[block], 0};
  return {weight.nested_absmax[block / weight.nested_blocksize], weight.nested_codes[block]};
}

BNBOPS_HD float scale_of(const Weight4bit& weight, const StoredScale& stored) {
  if (weight.absmax != nullptr) return stored.absmax;
  return nested_scale(weight.nested_codebook[stored.code], stored.absmax, *weight.nested_offset);
}

BNBOPS_HD float scale_of_block(const Weight4bit& weight, int64_t block) {
  return scale_of(weight, load_scale(weight, block));
}

BNBOPS_NAMESPACE_END
