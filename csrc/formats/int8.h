// What int8 codes of activations and weights mean, written once, for loops that the compiler vectorizes and for
// devices.
//
// A row (or column) of codes has one fp32 scale, its largest magnitude; a code c stands for c * scale / 127. A product
// of two rows of codes is an exact sum of integers. Source: Dettmers et al., "LLM.int8()" (arXiv:2208.07339).
#pragma once

#include "codecs/codec.h"

BNBOPS_NAMESPACE_BEGIN

constexpr uint32_t kFloatMaxBits = 0x7F7FFFFFU;
// The most products of two codes whose sum an int32 holds for certain: 2^31 / 2^14, less one.
constexpr int64_t kMaxInt8Products = 131071;
constexpr float kInverse127 = 1.0F / 127.0F;
constexpr float kInverse127Squared = 1.0F / (127.0F * 127.0F);  // bitsandbytes has 6.200124e-05, a digit short

// ---- floats to codes -------------------------------------------------------------------------------------------

BNBOPS_HD uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFU; }

// The bits of the smallest magnitude that is left out: an outlier or, without a threshold (0), a NaN. A NaN's bits are
// larger than any number's, so it is always left out.
BNBOPS_HD uint32_t left_out_from(float threshold) {
  if (!(threshold > 0)) return kInfinityBits + 1;
  return threshold < float_from_bits(kInfinityBits) ? bits_of(threshold) : kInfinityBits;
}

// Whether x is left out, and a number.
BNBOPS_HD uint32_t is_outlier(float x, uint32_t limit) {
  const uint32_t bits = magnitude_bits(x);
  return static_cast<uint32_t>(bits >= limit) & static_cast<uint32_t>(bits <= kInfinityBits);
}

// 0 for what is left out. An infinity counts as the largest float. (A mask: choices are not always vectorized.)
BNBOPS_HD uint32_t counted_bits(float x, uint32_t limit) {
  const uint32_t bits = magnitude_bits(x);
  const uint32_t all_ones_if_counted = 0U - static_cast<uint32_t>(bits < limit);
  return (bits < kFloatMaxBits ? bits : kFloatMaxBits) & all_ones_if_counted;
}

// The code of x: x * factor to nearest, ties to even, by the float adder.
BNBOPS_HD int8_t int8_code(float x, float factor, uint32_t limit) {
  const float counted = float_from_bits(counted_bits(x, limit) | (bits_of(x) & 0x80000000U));
  return static_cast<int8_t>(bits_of(counted * factor + 12582912.0F) - 0x4B400000U);
}

// The factor that makes codes of a row: 127 * inverse_scale(absmax), in the roundings of bitsandbytes. A tiny absmax
// has no finite one.
BNBOPS_HD float code_factor(float inverse) { return decodable(127.0F * inverse); }

// ---- and back --------------------------------------------------------------------------------------------------

// Scales have passed decodable(): then 0 times an infinite one is 0, and a NaN remains.
BNBOPS_HD float int8_value(int8_t code, float scale) { return static_cast<float>(code) * scale * kInverse127; }

// A sum of products of codes.
BNBOPS_HD float product_value(int32_t sum, float row_scale, float column_scale) {
  return static_cast<float>(sum) * without_infinity(row_scale * column_scale) * kInverse127Squared;
}

BNBOPS_NAMESPACE_END
