// All codecs of optimizer states.
#pragma once

#include <type_traits>

#include "codecs/dynamic8.h"
#include "codecs/e4m3.h"

BNBOPS_NAMESPACE_BEGIN

template <class... Codecs>
struct CodecList {
  static constexpr int kSize = sizeof...(Codecs);
};
using AllCodecs = CodecList<Dynamic8, E4m3>;

// Those whose kernels are compiled together with every rule. The others' decode and encode whole blocks, apart from it.
using FusedCodecs = AllCodecs;

constexpr const char* kDefaultCodec = Dynamic8::kName;
constexpr int kUncoded = -1;  // in place of a codec's number: fp32
constexpr int kMixed = -2;    // several
constexpr const char* kUncodedName = "fp32";

// Calls visit(codec, index) for each of them; a codec is an empty struct.
template <class Visit, class... Codecs>
constexpr void for_each_codec(CodecList<Codecs...>, const Visit& visit) {
  int index = 0;
  (visit(Codecs{}, index++), ...);
}

// A codec's number in AllCodecs.
template <class Codec>
constexpr int number_of() {
  int number = kUncoded;
  for_each_codec(AllCodecs{}, [&](auto codec, int i) {
    if (std::is_same_v<decltype(codec), Codec>) number = i;
  });
  return number;
}

BNBOPS_NAMESPACE_END
