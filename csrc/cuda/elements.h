// Eight consecutive elements of a tensor on their way between memory and registers.
//
// Whole, aligned octets move by accesses of 16 bytes (8 for codes); a tail, or what lies askew, element by element.
// Loading and converting are apart, so that all loads of a kernel are under way before the first conversion waits.
// The dtype is the same for all threads: a branch that costs nothing beside the memory.
#pragma once

#include "codecs/codec.h"
#include "cuda/device.h"

namespace bnbops::cuda {

constexpr int kOctet = 8;

struct Octet {
  uint32_t word[kOctet];  // fp32 elements, or pairs of 16-bit ones in the first half
};

BNBOPS_DEVICE void load_words(const char* from, uint32_t* word) {
  const auto four = load_vector<uint4>(from);
  word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
}

BNBOPS_DEVICE void store_words(char* to, const uint32_t* word) {
  store_vector(to, make_uint4(word[0], word[1], word[2], word[3]));
}

// Elements at, at + 1, ... ; `count` of them, or all eight if there are more. The others are zeros.
BNBOPS_DEVICE Octet load_octet(const void* values, DType dtype, int64_t at, int64_t count) {
  const char* from = global_pointer(static_cast<const char*>(values) + at * size_of(dtype));
  Octet octet{};
  if (count >= kOctet && is_aligned<uint4>(from)) {
    load_words(from, octet.word);
    if (dtype == DType::kFloat32) load_words(from + sizeof(uint4), octet.word + 4);
    return octet;
  }
  unrolled<kOctet>([&](int i) {
    if (i >= count) return;
    if (dtype == DType::kFloat32) {
      octet.word[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      octet.word[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i]) << (i % 2 * 16);
    }
  });
  return octet;
}

BNBOPS_DEVICE void to_floats(const Octet& octet, DType dtype, float (&x)[kOctet]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = float_from_bits(octet.word[i]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = from_bfloat16(octet.word[i / 2] >> (i % 2 * 16) & 0xFFFFU);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = from_float16(octet.word[i / 2] >> (i % 2 * 16) & 0xFFFFU);
  }
}

// Whatever NaN there is, the one of portable.h is written.
BNBOPS_DEVICE Octet from_floats(const float (&x)[kOctet], DType dtype) {
  Octet octet{};
  if (dtype == DType::kFloat32) {
    unrolled<kOctet>([&](int i) { octet.word[i] = bits_of(with_one_nan(x[i])); });
  } else {
    unrolled<kOctet / 2>([&](int i) { octet.word[i] = pack_halves(dtype, x[2 * i], x[2 * i + 1]); });
  }
  return octet;
}

BNBOPS_DEVICE void store_octet(void* values, DType dtype, int64_t at, int64_t count, const float (&x)[kOctet]) {
  char* to = global_pointer(static_cast<char*>(values) + at * size_of(dtype));
  const Octet octet = from_floats(x, dtype);
  if (count >= kOctet && is_aligned<uint4>(to)) {
    store_words(to, octet.word);
    if (dtype == DType::kFloat32) store_words(to + sizeof(uint4), octet.word + 4);
    return;
  }
  unrolled<kOctet>([&](int i) {
    if (i >= count) return;
    if (dtype == DType::kFloat32) {
      reinterpret_cast<uint32_t*>(to)[i] = octet.word[i];
    } else {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(octet.word[i / 2] >> (i % 2 * 16));
    }
  });
}

// Eight codes of a byte each, the first one in the lowest bits; beyond `count` they are `rest`.
BNBOPS_DEVICE uint2 load_codes(const uint8_t* codes, int64_t count, uint8_t rest = 0) {
  codes = global_pointer(codes);
  if (count >= kOctet && is_aligned<uint2>(codes)) return load_vector<uint2>(codes);
  uint32_t word[2] = {};
  unrolled<kOctet>([&](int i) { word[i / 4] |= static_cast<uint32_t>(i < count ? codes[i] : rest) << (i % 4 * 8); });
  return make_uint2(word[0], word[1]);
}

BNBOPS_DEVICE uint32_t code_of(const uint2& codes, int i) { return (i < 4 ? codes.x : codes.y) >> (i % 4 * 8) & 0xFFU; }

BNBOPS_DEVICE void store_codes(uint8_t* to, int64_t count, const uint2& codes) {
  to = global_pointer(to);
  if (count >= kOctet && is_aligned<uint2>(to)) return store_vector(to, codes);
  unrolled<kOctet>([&](int i) {
    if (i < count) to[i] = static_cast<uint8_t>(code_of(codes, i));
  });
}

// Byte `kByte` of each of four words.
template <uint32_t kByte>
BNBOPS_DEVICE uint32_t pack_bytes(const uint32_t* word) {
  constexpr uint32_t kPair = kByte | (kByte + 4) << 4;
  return permute_bytes<0x5410>(permute_bytes<kPair>(word[0], word[1]), permute_bytes<kPair>(word[2], word[3]));
}

// A byte for each of four numbers, 255 where the sign is minus.
BNBOPS_DEVICE uint32_t pack_signs(const float* x) {
  constexpr uint32_t kPair = 0xFB;
  return permute_bytes<0x5410>(permute_bytes<kPair>(bits_of(x[0]), bits_of(x[1])),
                               permute_bytes<kPair>(bits_of(x[2]), bits_of(x[3])));
}

BNBOPS_DEVICE uint2 pack_codes(const uint32_t (&code)[kOctet]) {
  return make_uint2(pack_bytes<0>(code), pack_bytes<0>(code + 4));
}

// ---- what quantization asks of them ------------------------------------------------------------------------------

BNBOPS_DEVICE float largest_magnitude(const float (&x)[kOctet]) {
  float largest = 0;
  unrolled<kOctet>([&](int i) { largest = max_or_nan(largest, fabsf(x[i])); });
  return largest;
}

// Makes all of them encodable, and returns the largest magnitude.
BNBOPS_DEVICE float make_encodable(float (&x)[kOctet]) {
  const float largest = largest_magnitude(x);
  if (largest <= kFloatMax) return largest;
  unrolled<kOctet>([&](int i) { x[i] = encodable(x[i]); });
  return largest_magnitude(x);
}

// ---- single elements ---------------------------------------------------------------------------------------------

BNBOPS_DEVICE void store_element(void* values, DType dtype, int64_t at, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[at] = with_one_nan(x);
  } else {
    static_cast<uint16_t*>(values)[at] = static_cast<uint16_t>(pack_halves(dtype, x, 0.0F));
  }
}

BNBOPS_DEVICE float load_element(const void* values, DType dtype, int64_t at) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(values)[at]
                                  : from_half(dtype, static_cast<const uint16_t*>(values)[at]);
}

}  // namespace bnbops::cuda
