// What a 4-bit format is: data alone, of which every loop on any device is made.
//
// Elements are numbered in logical order, over rows. Two codes share a byte; an odd count ends with the code of 0.
// Element i has the value values[code[i]] * scale of block i / blocksize (scale.h).
// Encoding takes the nearest value to x * (1 / absmax), the lower one in a tie, after the care of codecs/codec.h for
// elements that are not finite.
//
// New format: a constant in a file of its own, and its row in kFormats4bit (all.h).
#pragma once

#include "codecs/codec.h"
#include "core/nibbles.h"

BNBOPS_NAMESPACE_BEGIN

constexpr int kCodes4bit = 16;
constexpr int kBuckets4bit = 16;  // of magnitudes, 1/16 wide each

// One comparison tells the code, since a bucket holds at most one midpoint between values. Buckets 16 ... 31 are for
// positive elements, 0 ... 15 for the others.
struct Encoder4bit {
  uint32_t threshold[2 * kBuckets4bit];  // a float: magnitudes above it get `beyond` ...
  uint32_t beyond[2 * kBuckets4bit];
  uint32_t within[2 * kBuckets4bit];  // ... and the others `within`
};

struct Format4bit {
  const char* name;
  float values[kCodes4bit];  // of the codes: the largest magnitude is 1, and one of them is 0
  Nibbles nibbles;
  int64_t smallest_block;  // elements that share a scale: a power of two
  Encoder4bit encoder;
  bool buckets_suffice;  // or the encoder misplaces an element
};

// Codes by growing value. A value may have a second code, which then stands for nothing; but a second zero that is
// listed after the first stands for the positive elements that are nearest to 0.
struct CodeOrder {
  uint8_t code[kCodes4bit];
  int count;
};

constexpr CodeOrder first_codes_by_value(const float (&values)[kCodes4bit]) {
  CodeOrder order{};
  for (int code = 0; code < kCodes4bit; ++code) {
    int at = 0;
    while (at < order.count && values[order.code[at]] < values[code]) ++at;
    if (at < order.count && values[order.code[at]] == values[code]) continue;
    for (int i = order.count++; i > at; --i) order.code[i] = order.code[i - 1];
    order.code[at] = static_cast<uint8_t>(code);
  }
  return order;
}

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

constexpr Encoder4bit make_encoder_4bit(const float (&values)[kCodes4bit], const CodeOrder& order,
                                        bool& buckets_suffice) {
  constexpr uint32_t kNever = 0x7F800000U;
  Encoder4bit encoder{};
  buckets_suffice = true;
  for (const bool positive : {false, true}) {
    // Values by growing magnitude, beginning with the 0 of the elements on this side.
    int at = 0;
    while (values[order.code[at]] < 0) ++at;
    if (positive && values[order.code[at + 1]] == 0) ++at;
    const int step = positive ? 1 : -1, end = positive ? order.count - 1 : 0;
    for (int bucket = 0; bucket < kBuckets4bit; ++bucket) {
      const int slot = bucket + (positive ? kBuckets4bit : 0);
      encoder.within[slot] = encoder.beyond[slot] = order.code[at];
      encoder.threshold[slot] = kNever;
      if (at == end) continue;
      const float midpoint = 0.5F * values[order.code[at]] + 0.5F * values[order.code[at + step]];
      const float magnitude = positive ? midpoint : -midpoint;
      const float edge = static_cast<float>(bucket) / kBuckets4bit, next = edge + 1.0F / kBuckets4bit;
      if (magnitude >= next) continue;
      // Rounding moves magnitudes just below the next edge into its bucket, where they must not need this midpoint.
      constexpr float kMargin = 1e-6F;
      if (magnitude < edge || magnitude > next - kMargin) buckets_suffice = false;
      // Strictly greater elements take the higher code: a negative one in a tie has passed its midpoint.
      encoder.threshold[slot] = fraction_bits(positive ? magnitude : below(magnitude));
      at += step;
      encoder.beyond[slot] = order.code[at];
    }
    if (at != end) buckets_suffice = false;
  }
  return encoder;
}

constexpr Format4bit make_format_4bit(const char* name, const float (&values)[kCodes4bit], Nibbles nibbles,
                                      int64_t smallest_block, const CodeOrder& order) {
  Format4bit format{name, {}, nibbles, smallest_block, {}, true};
  format.encoder = make_encoder_4bit(values, order, format.buckets_suffice);
  for (int code = 0; code < kCodes4bit; ++code) format.values[code] = values[code];
  return format;
}

constexpr Format4bit make_format_4bit(const char* name, const float (&values)[kCodes4bit], Nibbles nibbles,
                                      int64_t smallest_block) {
  return make_format_4bit(name, values, nibbles, smallest_block, first_codes_by_value(values));
}

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
  // side * (1 + magnitude): its exponent's lowest bit tells the side, its upper four fraction bits the bucket.
  const auto side = Lanes::select_if_less(Lanes::splat(0.0F), x, Lanes::splat(1.0F), Lanes::splat(2.0F));
  const auto position = Lanes::fma(Lanes::min(magnitude, Lanes::splat(0.96875F)), side, side);
  const auto slot = Lanes::template shift_right<19>(Lanes::as_int(position));
  return Lanes::as_int(
      Lanes::select_if_less(tables.threshold[slot], magnitude, tables.beyond[slot], tables.within[slot]));
}

BNBOPS_NAMESPACE_END
