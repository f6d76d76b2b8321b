// Blocks of states, each in the registers of a warp: eight elements in each lane. A state is fp32 or coded; what is not
// known before run time is the same for all lanes.
#pragma once

#include <type_traits>

#include "codecs/all.h"
#include "cuda/many_tensors.h"
#include "cuda/maps.h"
#include "ops/optimizer/step_job.h"

namespace bnbops::cuda {

static_assert(kStateBlock == kWarp * kOctet);

// In place of a codec:
struct Uncoded {};   // fp32
struct AnyCodec {};  // the slot tells
struct NoMaps {};    // and of what those need none of

// Calls visit(codec) for the one that has this number, or for Uncoded.
template <class Visit, class... Codecs>
BNBOPS_DEVICE void with_codec(int number, CodecList<Codecs...>, const Visit& visit) {
  if (number == kUncoded) return visit(Uncoded{});
  ((number == number_of<Codecs>() ? visit(Codecs{}) : void()), ...);
}

// Where a lane's elements are.
struct Place {
  int64_t block, at;  // the first one in the parameter
  int count;          // how many there are: 8, or fewer at the end of a block
};

template <class Job>
BNBOPS_DEVICE Place place_in(const Job& job, int64_t block) {
  const Span span = span_of(job, block);
  return {block, span.begin + lane_of_warp() * kOctet, static_cast<int>(span.n) - lane_of_warp() * kOctet};
}

// Elements as they are in memory: fp32, or codes in the first two words and their scale.
struct Loaded {
  Octet octet;
  float absmax;
};

// How states are read and written. All loads of a kernel are under way before the first one is decoded. What is beyond
// the end of a block is 0, as on the CPU. `maps` has the codec's map for the role as a base.
template <class Codec, Role kRole>
struct StateOf {
  using MapOf = Map<Codec, has_sign(kRole)>;

  BNBOPS_DEVICE static void load(const StateSlot& slot, const Place& place, Loaded& to) {
    constexpr uint8_t kZero = bnbops::code_of<Codec>(0, has_sign(kRole));
    const uint2 codes = load_codes(static_cast<const uint8_t*>(slot.data) + place.at, place.count, kZero);
    to.octet.word[0] = codes.x, to.octet.word[1] = codes.y;
    to.absmax = global_pointer(slot.absmax)[place.block];
  }

  BNBOPS_DEVICE static void decode(const StateSlot& /*slot*/, const Loaded& from, const MapOf& map,
                                   float (&x)[kOctet]) {
    const uint2 codes = make_uint2(from.octet.word[0], from.octet.word[1]);
    const float scale = decodable(from.absmax);
    unrolled<kOctet>([&](int i) { x[i] = map.value[code_of(codes, i)] * scale; });
  }

  // Elements that have no encoding as they are change. Every lane must have read the old scale.
  BNBOPS_DEVICE static void store(const StateSlot& slot, const Place& place, const MapOf& map, float (&x)[kOctet]) {
    const float absmax = float_from_bits(__reduce_max_sync(kAllLanes, bits_of(make_encodable(x))));
    store_codes(static_cast<uint8_t*>(slot.data) + place.at, place.count,
                codes_of<is_divisor(kRole)>(x, inverse_scale(absmax), map.code));
    if (lane_of_warp() == 0) global_pointer(slot.absmax)[place.block] = absmax;
  }
};

template <Role kRole>
struct StateOf<Uncoded, kRole> {
  BNBOPS_DEVICE static void load(const StateSlot& slot, const Place& place, Loaded& to) {
    to.octet = load_octet(slot.data, DType::kFloat32, place.at, place.count);
  }

  BNBOPS_DEVICE static void decode(const StateSlot& /*slot*/, const Loaded& from, NoMaps, float (&x)[kOctet]) {
    to_floats(from.octet, DType::kFloat32, x);
  }

  BNBOPS_DEVICE static void store(const StateSlot& slot, const Place& place, NoMaps, float (&x)[kOctet]) {
    store_octet(slot.data, DType::kFloat32, place.at, place.count, x);
  }
};

template <Role kRole>
struct StateOf<AnyCodec, kRole> {
  BNBOPS_DEVICE static NoMaps map_of(Uncoded) { return {}; }
  template <class Codec>
  BNBOPS_DEVICE static const auto& map_of(Codec) {
    return kMap<Codec, has_sign(kRole)>;
  }

  BNBOPS_DEVICE static void load(const StateSlot& slot, const Place& place, Loaded& to) {
    with_codec(slot.codec, AllCodecs{}, [&](auto codec) { StateOf<decltype(codec), kRole>::load(slot, place, to); });
  }

  BNBOPS_DEVICE static void decode(const StateSlot& slot, const Loaded& from, NoMaps, float (&x)[kOctet]) {
    with_codec(slot.codec, AllCodecs{},
               [&](auto codec) { StateOf<decltype(codec), kRole>::decode(slot, from, map_of(codec), x); });
  }

  BNBOPS_DEVICE static void store(const StateSlot& slot, const Place& place, NoMaps, float (&x)[kOctet]) {
    with_codec(slot.codec, AllCodecs{},
               [&](auto codec) { StateOf<decltype(codec), kRole>::store(slot, place, map_of(codec), x); });
  }
};

}  // namespace bnbops::cuda
