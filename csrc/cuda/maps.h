// The dynamic maps and their encoders in a device's memory, and their way to shared memory.
#pragma once

#include "codecs.h"
#include "cuda/threads.h"
#include "lanes_scalar.h"

namespace bnbops::cuda {

struct Map {
  float value[kCodebookSize];
  DynamicEncoder encoder;
};

constexpr Map make_map(const float* values, const DynamicEncoder& encoder) {
  Map map{};
  for (int i = 0; i < kCodebookSize; ++i) map.value[i] = values[i];
  map.encoder = encoder;
  return map;
}

// By StateSpec::is_signed.
static __device__ const Map kMaps[2] = {make_map(kDynamicUnsigned, kEncodeUnsigned),
                                        make_map(kDynamicSigned, kEncodeSigned)};

// The code of an encodable element.
template <bool kSigned, bool kKeepPositive = false>
BNBOPS_DEVICE uint32_t dynamic_code(float x, float inverse, const DynamicEncoder& encoder) {
  const DynamicTables<ScalarLanes> tables(encoder);
  const int k = numbered_magnitude<ScalarLanes, kSigned, kKeepPositive>(x, inverse, tables);
  return ScalarLanes::code_of_magnitude<kSigned>(k);
}

}  // namespace bnbops::cuda
