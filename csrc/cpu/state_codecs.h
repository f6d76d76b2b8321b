// The codecs of optimizer states on the CPU: tables for decoding, and what encodes a block.
#pragma once

#include <array>

#include "codecs/all.h"
#include "cpu/blocks.h"
#include "ops/optimizer/step_job.h"

BNBOPS_NAMESPACE_BEGIN

// What a codec's codes of a role decode to.
template <class Lanes, class Codec>
const typename Lanes::Codebook& codebook_of(Role role) {
  static const typename Lanes::Codebook codebooks[2] = {typename Lanes::Codebook(Codec::values(false)),
                                                        typename Lanes::Codebook(Codec::values(true))};
  return codebooks[has_sign(role)];
}

// Encodes one block of a state and returns its scale; `largest` are the bits of its largest magnitude. Elements of x
// that have no encoding as they are change.
template <class Lanes, class Codec, bool kSigned, bool kDivisor>
float encode_block(float* x, int64_t n, uint32_t largest, uint8_t* codes) {
  if (largest >= kInfinityBits) {
    make_encodable(x, n, kSigned, x);
    largest = largest_magnitude_bits<Lanes, kSigned>(x, n);
  }
  const float absmax = float_from_bits(largest);
  encode<Lanes, typename Codec::template Encoder<Lanes, kSigned, kDivisor>>(x, n, inverse_scale(absmax), codes);
  return absmax;
}

using BlockEncoder = float (*)(float* x, int64_t n, uint32_t largest, uint8_t* codes);

template <class Lanes, class Codec>
BlockEncoder encoder_of(Role role) {
  if (is_divisor(role)) {
    return has_sign(role) ? encode_block<Lanes, Codec, true, true> : encode_block<Lanes, Codec, false, true>;
  }
  return has_sign(role) ? encode_block<Lanes, Codec, true, false> : encode_block<Lanes, Codec, false, false>;
}

// A codec that is known at run time only.
template <class Lanes>
struct AnyCodec {
  const typename Lanes::Codebook& (*codebook)(Role);
  BlockEncoder (*encoder)(Role);

  void decode(Role role, const uint8_t* codes, int64_t n, float absmax, float* out) const {
    bnbops::decode<Lanes>(codebook(role), codes, n, decodable(absmax), out, DType::kFloat32);
  }

  // x changes where it has no encoding as it is.
  float encode(Role role, float* x, int64_t n, uint8_t* codes) const {
    const uint32_t largest =
        has_sign(role) ? largest_magnitude_bits<Lanes, true>(x, n) : largest_magnitude_bits<Lanes, false>(x, n);
    return encoder(role)(x, n, largest, codes);
  }
};

template <class Lanes>
const AnyCodec<Lanes>& codec_numbered(int number) {
  static const auto codecs = [] {
    std::array<AnyCodec<Lanes>, AllCodecs::kSize> all{};
    for_each_codec(AllCodecs{}, [&](auto codec, int i) {
      using Codec = decltype(codec);
      all[i] = {codebook_of<Lanes, Codec>, encoder_of<Lanes, Codec>};
    });
    return all;
  }();
  return codecs[number];
}

// ---- states outside a step -------------------------------------------------------------------------------------

template <class Lanes>
void encode_states(const StateJob& job, int64_t first, int64_t last) {
  alignas(64) float x[kStateBlock];
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    make_encodable(static_cast<const float*>(job.from) + span.begin, span.n, has_sign(job.role), x);
    auto* codes = static_cast<uint8_t*>(job.to) + span.begin;
    job.absmax[block] = codec_numbered<Lanes>(job.codec).encode(job.role, x, span.n, codes);
  }
}

template <class Lanes>
void decode_states(const StateJob& job, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const Span span = span_of(job, block);
    const auto* codes = static_cast<const uint8_t*>(job.from) + span.begin;
    codec_numbered<Lanes>(job.codec).decode(job.role, codes, span.n, job.absmax[block],
                                            static_cast<float*>(job.to) + span.begin);
  }
}

BNBOPS_NAMESPACE_END
