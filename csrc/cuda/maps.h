// What a codec's codes mean and which ones elements have, as tables in a device's memory.
#pragma once

#include "cuda/code_table.h"
#include "cuda/elements.h"
#include "cuda/threads.h"

namespace bnbops::cuda {

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
