// The codecs of optimizer states on the CPU: tables for decoding, and what encodes a block.
#pragma once

#include <array>

#include "codecs/all.h"
#include "cpu/blocks.h"
#include "ops/optimizer/step_job.h"

BNBOPS_NAMESPACE_BEGIN

// One block of a state on its way to codes. `largest` are the bits of its largest magnitude; returns its scale.
// Elements of x that have no encoding as they are change.
template <class Lanes, bool kSigned>
float scale_of(float* x, int64_t n, uint32_t largest) {
  if (largest >= kInfinityBits) {
    make_encodable(x, n, kSigned, x);
    largest = largest_magnitude_bits<Lanes, kSigned>(x, n);
  }
  return float_from_bits(largest);
}

// How a state of a role is coded.
template <class Lanes, class Codec, Role kRole>
struct Coding {
  static constexpr bool kSigned = has_sign(kRole);
  using Decoder = typename Codec::template Decoder<Lanes, kSigned>;
  using Encoder = typename Codec::template Encoder<Lanes, kSigned, is_divisor(kRole)>;

  static void decode(const uint8_t* codes, int64_t n, float absmax, float* out) {
    const Decoder decoder;
    const auto scale = Lanes::splat(decodable(absmax));
    map_chunks<Lanes, kGroup<Lanes>>(codes, 8, out, kFloatBits, n, [&](const uint8_t* from, uint8_t* to) {
      const auto opened = decoder.open(from);
      for (int v = 0; v < 4; ++v) {
        const auto x = Lanes::mul(decoder.decode(opened, v), scale);
        store_as<Lanes>(to, DType::kFloat32, v * Lanes::kWidth, x);
      }
    });
  }

  // Returns the scale. x changes where it has no encoding as it is.
  static float encode(float* x, int64_t n, uint8_t* codes) {
    const float absmax = scale_of<Lanes, kSigned>(x, n, largest_magnitude_bits<Lanes, kSigned>(x, n));
    bnbops::encode<Lanes, Encoder>(x, n, inverse_scale(absmax), codes);
    return absmax;
  }
};

// A codec that is known at run time only, by role.
struct AnyCodec {
  struct {
    void (*decode)(const uint8_t* codes, int64_t n, float absmax, float* out);
    float (*encode)(float* x, int64_t n, uint8_t* codes);
  } coding[std::size(kCodedRoles)];

  template <class Lanes, class Codec, Role... kRoles>
  static AnyCodec of() {
    return {{{Coding<Lanes, Codec, kRoles>::decode, Coding<Lanes, Codec, kRoles>::encode}...}};
  }
};

template <class Lanes>
const auto& coding_of(int codec, Role role) {
  static const auto codecs = [] {
    std::array<AnyCodec, AllCodecs::kSize> all{};
    for_each_codec(AllCodecs{}, [&](auto codec, int i) {
      all[i] = AnyCodec::of<Lanes, decltype(codec), Role::kSigned, Role::kSquare, Role::kSignedSquare>();
    });
    return all;
  }();
  return codecs[codec].coding[static_cast<int>(role)];
}

// ---- states outside a step -------------------------------------------------------------------------------------

template <class Lanes>
void encode_states(const StateJob& job, int64_t first, int64_t last) {
  alignas(64) float x[kStateBlock];
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    make_encodable(static_cast<const float*>(job.from) + span.begin, span.n, has_sign(job.role), x);
    auto* codes = static_cast<uint8_t*>(job.to) + span.begin;
    job.absmax[block] = coding_of<Lanes>(job.codec, job.role).encode(x, span.n, codes);
  }
}

template <class Lanes>
void decode_states(const StateJob& job, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    const auto* codes = static_cast<const uint8_t*>(job.from) + span.begin;
    coding_of<Lanes>(job.codec, job.role)
        .decode(codes, span.n, job.absmax[block], static_cast<float*>(job.to) + span.begin);
  }
}

BNBOPS_NAMESPACE_END
