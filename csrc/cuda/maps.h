// The dynamic maps in a device's memory, and the codes of eight elements under them.
#pragma once

#include "codecs/dynamic8.h"
#include "cuda/code_table.h"
#include "cuda/elements.h"
#include "cuda/threads.h"

namespace bnbops::cuda {

template <bool kSigned>
struct alignas(16) Map {
  float value[kCodebookSize];
  CodeTable<kSigned> code;
};

template <bool kSigned>
constexpr Map<kSigned> make_map(const float* values, const DynamicEncoder& encoder) {
  Map<kSigned> map{};
  for (int i = 0; i < kCodebookSize; ++i) map.value[i] = values[i];
  map.code = make_code_table<kSigned>(encoder);
  return map;
}

template <bool kSigned>
static __device__ const Map<kSigned> kMap =
    make_map<kSigned>(kSigned ? kDynamicSigned : kDynamicUnsigned, kSigned ? kEncodeSigned : kEncodeUnsigned);

// The codes of four elements, of the codes of their magnitudes and of bytes that are 255 where an element is negative:
// 254 - code there, but 0 for the largest magnitude, which the signed map has only once.
BNBOPS_DEVICE uint32_t with_signs(uint32_t codes, uint32_t negative) {
  const uint32_t flipped = ~codes & negative, above_zero = (flipped + 0x7F7F7F7FU) >> 7 & 0x01010101U;
  return (codes ^ negative) - above_zero;
}

// The codes of encodable elements, which are not negative for the unsigned map. `inverse` is that of their scale, which
// keeps `a` below 2. With kKeepPositive, as numbered_magnitude.
template <bool kKeepPositive = false, bool kSigned>
BNBOPS_DEVICE uint2 dynamic_codes(const float (&x)[kOctet], float inverse, const CodeTable<kSigned>& table) {
  constexpr uint32_t kSmallestPositive = (kSigned ? 128U : 1U) << 24;
  uint32_t code[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    code[i] = table.code(fused_multiply_add(fabsf(x[i]), inverse, kShift));
    if (kKeepPositive && x[i] > 0 && code[i] < kSmallestPositive) code[i] = kSmallestPositive;
  }
  uint32_t word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    word[i] = pack_bytes<3>(code + 4 * i);
    if (kSigned) word[i] = with_signs(word[i], pack_signs(x + 4 * i));
  }
  return make_uint2(word[0], word[1]);
}

}  // namespace bnbops::cuda
